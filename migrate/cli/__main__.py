"""`python -m migrate.cli` is `tcpmig`."""

import sys

from migrate.cli.main import main

sys.exit(main())
