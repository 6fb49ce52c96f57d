"""Where the package touches other libraries: ``table.py`` lists every place, ``patches.py`` says how it is done."""
