"""The study's last CNN, which fuses ten faces and a voice."""

import keras
from keras import layers

from recipes.blocks import FACE_OUTPUTS, FRAMES, VOICE_OUTPUTS, concat, normalize


def last_cnn(as_run: bool = False, normalization: str = "batch") -> keras.Model:
    """The study's fusion (its figure 5): the outputs of ten faces and a voice -> logit (1).

    Inputs, by name: face_embedding (10, 64), face_side1 (10, 128), face_side2 (10, 88), face_side3 (10, 64),
    voice_embedding (32), voice_side1 to voice_side3 (128); face_mask (10,) and voice_mask (1,): 1 for a face
    or a voice, 0 for a missing one, which enters as zeros. The study had no masks; they add no parameters.

    726,657 parameters as drawn. When it was run (``as_run``), only the side outputs of the first seven images
    were read, and a dense 128 with BatchNorm was left unconnected, which no Keras model counts: 383,393.
    """
    face = {key: keras.Input((FRAMES, units), name=f"face_{key}") for key, units in FACE_OUTPUTS.items()}
    voice = {key: keras.Input((units,), name=f"voice_{key}") for key, units in VOICE_OUTPUTS.items()}
    face_mask, voice_mask = keras.Input((FRAMES,), name="face_mask"), keras.Input((1,), name="voice_mask")
    inputs = {x.name: x for x in [*face.values(), *voice.values(), face_mask, voice_mask]}

    per_frame = layers.Reshape((FRAMES, 1))(face_mask)
    face = {key: layers.Multiply()([x, per_frame]) for key, x in face.items()}
    voice = {key: layers.Multiply()([x, voice_mask]) for key, x in voice.items()}
    if as_run:
        face.update({key: layers.Cropping1D((0, 3))(face[key]) for key in ("side1", "side2", "side3")})
    face = {key: layers.Flatten()(x) for key, x in face.items()}

    def dense(x, units, activation):
        return activation(normalize(layers.Dense(units)(x), normalization))

    y = concat(face["embedding"], voice["embedding"], name="y")
    a = dense(y, 256, layers.LeakyReLU(negative_slope=0.1))
    b = dense(concat(y, a, face["side3"], voice["side3"]), 64, layers.ReLU())
    c = dense(concat(y, a, b, face["side2"], voice["side2"]), 64, layers.ReLU())
    d = concat(y, a, b, c, face["side1"], voice["side1"], name="d")
    if not as_run:
        d = dense(d, 128, layers.ReLU())
    return keras.Model(inputs, layers.Dense(1, name="logit")(d), name="last_cnn")
