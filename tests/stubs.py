"""A stand-in for the scoring of a folder; it imports nothing, so that killed runs start quickly."""


def one_by_one(predict):
    """The ``run`` of ``score_clips`` that calls ``predict(name, path, frames)`` on clip after clip."""

    def run(asks):
        for ask in asks:
            try:
                yield ask, predict(*ask)
            except Exception as error:
                yield ask, error

    return run
