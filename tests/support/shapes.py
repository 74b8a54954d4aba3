"""The shape of a JSON answer, to compare one with its documented sample."""


def shape_of(value):
    """Keys in their order and types of values: what two answers must share."""
    if isinstance(value, dict):
        return [(key, shape_of(inner)) for key, inner in value.items()]
    if isinstance(value, list):
        return [shape_of(inner) for inner in value]
    return type(value)
