"""One module per row of `conversion.registry.FORMATS`: how files of a format are recognised, read and written."""
