"""Settings of every test.

Continuous integration draws the same examples every time, so that what lands does not depend on luck; a developer's run
draws new ones, and what it finds becomes a test or a fix.
"""

from __future__ import annotations

import os

from hypothesis import settings

settings.register_profile("integration", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("integration")
