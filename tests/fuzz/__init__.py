"""Files changed at random: nothing may end in a traceback, or in part of its outputs unsaid."""
