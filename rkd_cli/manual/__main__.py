"""``python -m rkd_cli.manual`` prints the page ``flags``; ``make manual`` writes it."""

import sys

from rkd_cli.manual import flags_page

sys.stdout.write(flags_page())
