"""The unit of positions in a run's log and pictures: metres, unless the label file says otherwise."""
_unit = "m"


def set_unit(unit):
    """Set the unit: 'm', or 'model units' for a reconstruction whose scale is unknown."""
    global _unit
    _unit = unit


def in_unit(text):
    """A text with `[m]`, the published mark of metres, in the unit."""
    return text if _unit == "m" else text.replace("[m]", f"[{_unit}]")
