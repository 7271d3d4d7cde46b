"""``python -m rkd_cli`` is ``rkd``."""

from rkd_cli.cli import main

main()
