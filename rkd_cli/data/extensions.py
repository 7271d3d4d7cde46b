"""The extensions of image files."""

from __future__ import annotations

try:
    import pillow_heif
except ImportError:  # optional
    HEIC_READER = ""
else:
    pillow_heif.register_heif_opener()  # on import, and so in every worker process
    HEIC_READER = f"pillow-heif {pillow_heif.__version__}"

HEIC = (".heic", ".heif")
# formats of torchvision's ImageFolder, and of phones, cameras and browsers; GIF: the first frame
_ALWAYS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".jp2", ".j2k", ".jpx", ".png", ".gif", ".webp", ".avif"),
    *(".tif", ".tiff", ".bmp", ".ppm", ".pgm", ".pbm", ".pnm"),
)
EXTENSIONS = _ALWAYS + (HEIC if HEIC_READER else ())  # of image files in a folder without lists
