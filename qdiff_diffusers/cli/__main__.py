"""Makes ``python -m qdiff_diffusers.cli`` the same as ``qdiff``."""

from __future__ import annotations

from .app import main

if __name__ == "__main__":
    main()
