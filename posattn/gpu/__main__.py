"""`python -m posattn.gpu`: the command, and what the sanitizer runs."""

from __future__ import annotations

import sys

from posattn.gpu import main

sys.exit(main())
