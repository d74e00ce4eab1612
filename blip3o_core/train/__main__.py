"""python -m blip3o_core.train CONFIG.toml [section.key=value ...]"""

import sys

from .command import main

sys.exit(main())
