"""`python -m tisdpo` is the same as `tisdpo`."""

import sys

from tisdpo.cli import main

sys.exit(main())
