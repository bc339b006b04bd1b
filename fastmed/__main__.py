"`python -m fastmed` is the command `fastmed`"
import os
import sys

# as with the command, no module of the folder one stands in is run: it may be somebody else's
if sys.path and sys.path[0] in ('', os.getcwd()) and not getattr(sys.flags, 'safe_path', False):
    here = sys.path.pop(0)
    if os.path.samefile(here or '.', os.path.join(os.path.dirname(__file__), '..')): sys.path.append(here)

from fastmed.cli import main  # noqa: E402

if __name__=='__main__': sys.exit(main())
