"""Self-blended images, compression and the other augmentations, on a drawn face."""

import cv2
import keras
import numpy as np
import pytest
from keras import ops

from recipes.face import augment, compression, landmarks

SIZE = 224


def drawn_landmarks(centre=(112, 112), half_width=56, half_height=70):
    """81 landmarks of a frontal face whose outline is an ellipse, in pixels."""

    def arc(start, end, count, scale=1.0, at=(0.0, 0.0), stretch=(1.0, 1.0)):
        angle = np.radians(np.linspace(start, end, count))
        return np.stack(
            [at[0] + scale * stretch[0] * np.cos(angle), at[1] + scale * stretch[1] * np.sin(angle)], 1
        )

    parts = [
        arc(180, 0, 17),  # jaw, from the left ear over the chin
        np.stack([np.linspace(-0.7, -0.15, 5), np.full(5, -0.35)], 1),
        np.stack([np.linspace(0.15, 0.7, 5), np.full(5, -0.35)], 1),
        np.stack([np.zeros(4), np.linspace(-0.2, 0.15, 4)], 1),
        np.stack([np.linspace(-0.15, 0.15, 5), np.full(5, 0.22)], 1),
        arc(180, 540, 6, 0.12, (-0.4, -0.2)),
        arc(180, 540, 6, 0.12, (0.4, -0.2)),
        arc(180, 540, 12, 0.3, (0, 0.5), (1, 0.4)),
        arc(180, 540, 8, 0.2, (0, 0.5), (1, 0.3)),
        arc(190, 350, 13),  # forehead
    ]
    points = np.concatenate(parts) * [half_width, half_height] + centre
    assert points.shape == (81, 2)
    return points.astype("float32")


def drawn_face(count=4, size=SIZE, seed=0):
    """Smooth coloured noise with some edges, float32 (count, size, size, 3), 0–255."""
    random = np.random.default_rng(seed)
    small = random.uniform(20, 235, (count, 14, 14, 3))
    images = [cv2.resize(image, (size, size), interpolation=cv2.INTER_CUBIC) for image in small]
    return np.clip(images, 0, 255).astype("float32")


def masks_of(points, shape="hull", count=4):
    return (
        np.repeat(landmarks.face_mask(points, shape, SIZE)[None, ..., None], count, 0).astype("float32") / 255
    )


def numpy(x):
    return np.asarray(ops.convert_to_numpy(x))


def draws(count=4, seed=0):
    return augment.Draws(count, keras.random.SeedGenerator(seed))


@pytest.mark.parametrize("shape", [*landmarks.MASK_SHAPES, "raised_components"])
def test_mask_shapes_lie_inside_the_hull(shape):
    points = drawn_landmarks()
    mask, hull = landmarks.face_mask(points, shape, SIZE), landmarks.face_mask(points, "hull", SIZE)
    assert set(np.unique(mask)) == {0, 255}
    assert 0 < (mask > 0).sum() <= (hull > 0).sum() * 1.001


def test_erosion_keeps_what_a_blur_of_a_float_mask_leaves_at_one():
    mask = masks_of(drawn_landmarks(), count=3)
    core = numpy(augment.erode(mask, np.array([2.0, 7.0, 12.0], "float32").reshape(3, 1, 1, 1)))
    kept = core.sum((1, 2, 3)) / mask.sum((1, 2, 3))
    np.testing.assert_allclose(kept, [0.91, 0.73, 0.56], atol=0.03)
    for eroded, kernel in zip(core, (5, 15, 25), strict=True):
        blurred = cv2.GaussianBlur(mask[0, ..., 0], (kernel, kernel), 0)
        np.testing.assert_array_equal(eroded[..., 0], (blurred > 1 - 1e-6).astype("float32"))


def test_gaussian_matrix_is_the_blur_of_opencv():
    image = drawn_face(1)
    matrix = augment.gaussian_matrix(
        SIZE, np.full((1, 1, 1), 3.0, "float32"), np.full((1, 1, 1), 6.0, "float32")
    )
    ours = numpy(augment.along_rows_and_columns(image, matrix))[0]
    np.testing.assert_allclose(
        ours[8:-8, 8:-8], cv2.GaussianBlur(image[0], (13, 13), 3.0)[8:-8, 8:-8], atol=0.05
    )


def test_rescaling_by_one_changes_nothing_and_by_four_smooths():
    image = drawn_face(2) + np.random.default_rng(0).normal(0, 20, (2, SIZE, SIZE, 3)).astype("float32")
    matrix = augment.rescaling_matrix(SIZE, np.array([1.0, 4.0], "float32").reshape(2, 1, 1))
    same, small = numpy(augment.along_rows_and_columns(image, matrix))
    np.testing.assert_allclose(same, image[0], atol=0.02)
    assert np.abs(np.diff(small, axis=0)).mean() < np.abs(np.diff(image[1], axis=0)).mean() / 3
    assert abs(small.mean() - image[1].mean()) < 1


def test_self_blended_fake_equals_the_target_outside_its_mask_and_at_the_edge():
    points = drawn_landmarks(half_width=120, half_height=130)  # wider than the crop, as tight crops are
    blend = {
        name: numpy(x) for name, x in augment.self_blend(drawn_face(), masks_of(points), draws()).items()
    }
    outside = np.broadcast_to(blend["mask"] == 0, blend["fake"].shape)
    np.testing.assert_array_equal(blend["fake"][outside], blend["real"][outside])
    edge = int(0.06 * SIZE)
    inner = np.zeros((SIZE, SIZE), bool)
    inner[edge:-edge, edge:-edge] = True
    np.testing.assert_array_equal(blend["fake"][:, ~inner], blend["real"][:, ~inner])
    assert blend["mask"].min() >= 0 and blend["mask"].max() <= 1
    assert np.abs(blend["fake"] - blend["real"]).mean((1, 2, 3)).min() > 0.05


def test_a_fake_in_place_keeps_its_colours_and_loses_detail_inside_the_mask():
    noise = np.random.default_rng(0).normal(0, 12, (4, SIZE, SIZE, 3)).astype("float32")
    crops = np.clip(drawn_face() + noise, 0, 255)
    blend = augment.self_blend(crops, masks_of(drawn_landmarks()), draws(), in_place=1.0)
    blend = {name: numpy(x) for name, x in blend.items()}
    np.testing.assert_allclose(blend["real"], crops, atol=1e-3)
    assert np.abs(blend["fake"].mean((1, 2)) - crops.mean((1, 2))).max() < 2
    inside = blend["mask"][:, 1:, :, 0] > 0.9
    before, after = (np.abs(np.diff(images, axis=1))[inside].mean() for images in (crops, blend["fake"]))
    assert after < 0.8 * before


def test_blend_ratios_are_those_of_the_recipe():
    masks = masks_of(drawn_landmarks(), count=64)
    peaks = numpy(augment.self_blend(drawn_face(1).repeat(64, 0), masks, draws(64))["mask"]).max((1, 2, 3))
    assert {round(float(peak), 2) for peak in peaks} == {0.25, 0.5, 0.75, 1.0}


def test_an_empty_mask_leaves_the_crop_as_it_is():
    crops = drawn_face()
    fake = augment.self_blend(crops, np.zeros((4, SIZE, SIZE, 1), "float32"), draws())["fake"]
    np.testing.assert_array_equal(numpy(fake), crops)


@pytest.mark.parametrize("quality", [35, 60, 90])
def test_jpeg_does_what_opencv_does(quality):
    image = np.rint(drawn_face(1, seed=3))
    ours = numpy(compression.jpeg(image, np.full((1, 1, 1, 1), quality, "float32")))[0]
    options = [
        cv2.IMWRITE_JPEG_QUALITY,
        quality,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420,
    ]
    encoded = cv2.imencode(".jpg", image[0, ..., ::-1].astype("uint8"), options)[1]
    theirs = cv2.imdecode(encoded, cv2.IMREAD_COLOR)[..., ::-1].astype("float32")
    loss = np.abs(theirs - image[0]).mean()
    assert np.abs(ours - theirs).mean() < max(0.5 * loss, 1.0)


def test_sampling_an_unmoved_grid_gives_the_image_and_a_flip_its_mirror():
    image = drawn_face(2)
    np.testing.assert_allclose(
        numpy(augment.sample(image, *augment.affine_grid(SIZE, SIZE))), image, atol=1e-3
    )
    mirrored = numpy(augment.sample(image, *augment.affine_grid(SIZE, SIZE, flip=1.0)))
    np.testing.assert_allclose(mirrored, image[:, :, ::-1], atol=1e-3)


def test_part_cutout_blackens_the_chosen_part_only():
    points = np.repeat(drawn_landmarks()[None], 32, 0)
    cut = numpy(augment.part_cutout(np.full((32, SIZE, SIZE, 3), 200.0, "float32"), points, draws(32), 1.0))
    black = (cut == 0).mean((1, 2, 3))
    assert (black > 0.002).all() and (black < 0.12).all()
    centres = {
        tuple(points[0, part].mean(0).astype(int)) for part in (range(36, 48), range(27, 36), range(48, 68))
    }
    assert any((cut[:, y, x] == 0).any() and (cut[:, y, x] > 0).any() for x, y in centres)


def layer_inputs(count=4, label=0.0):
    return {
        "crop": drawn_face(count).astype("uint8"),
        "mask": np.zeros((count, SIZE, SIZE, 1), "uint8"),
        "points": np.repeat(drawn_landmarks()[None], count, 0),
        "label": np.full((count, 1), label, "float32"),
        "width": np.ones((count, 1), "float32"),
    }


def test_layer_augments_in_training_only():
    layer = augment.FaceAugment(SIZE, seed=1)
    inputs = layer_inputs()
    np.testing.assert_array_equal(numpy(layer(inputs, training=False)), inputs["crop"].astype("float32"))
    changed = numpy(layer(inputs, training=True))
    assert changed.shape == (4, SIZE, SIZE, 3) and np.isfinite(changed).all()
    assert changed.min() >= 0 and changed.max() <= 255
    assert np.abs(changed - inputs["crop"]).mean() > 5
    assert np.abs(numpy(layer(inputs, training=True)) - changed).mean() > 1  # another draw


def test_layer_resizes_and_survives_serialization():
    layer = augment.FaceAugment(256, zoom=1.3, seed=1)
    twin = augment.FaceAugment.from_config(layer.get_config())
    assert twin.settings == layer.settings
    assert layer(layer_inputs(), training=False).shape == (4, 256, 256, 3)
    assert layer(layer_inputs(), training=True).shape == (4, 256, 256, 3)


def test_wide_crops_are_cut_to_the_tight_framing():
    still = {"zoom": 1.0, "shift": 0.0, "angle": 0.0, "cutout": 0.0, "quality": 0.0, "shifted_reals": 0.0}
    inputs = layer_inputs()
    x = np.linspace(0, 200, SIZE)
    inputs["crop"] = np.repeat(np.broadcast_to(x[:, None, None], (SIZE, SIZE, 3))[None], 4, 0).astype("uint8")
    spans = {}
    for width in (1.0, 2.0):
        inputs["width"] = np.full((4, 1), width, "float32")
        seen = numpy(augment.FaceAugment(SIZE, seed=1, **still)(inputs, training=True)).mean((2, 3))
        spans[width] = seen[:, -SIZE // 8] - seen[:, SIZE // 8]
    np.testing.assert_allclose(spans[2.0] / spans[1.0], 0.5, atol=0.03)


def test_masks_move_with_the_crop():
    inputs = layer_inputs()
    inputs["mask"][1, SIZE // 4 : -SIZE // 4, SIZE // 4 : -SIZE // 4] = 255
    layer = augment.FaceAugment(SIZE, seed=3, with_masks=True)
    seen = layer(inputs, training=True)
    assert seen["pixels"].shape == (4, SIZE, SIZE, 3) and seen["mask"].shape == (4, SIZE, SIZE, 1)
    assert numpy(seen["mask"])[1].max() > 0.1 and not numpy(seen["mask"])[[0, 2, 3]].any()
    assert not numpy(layer(inputs, training=False)["mask"]).any()
