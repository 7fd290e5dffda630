"""`python -m nsa_port` is the command `nsa-port`."""

import sys

from nsa_port.cli import main

sys.exit(main())
