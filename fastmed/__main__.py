"`python -m fastmed` is the command `fastmed`"
import sys
from fastmed.cli import main

if __name__=='__main__': sys.exit(main())
