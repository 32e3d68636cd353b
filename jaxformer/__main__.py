"""python -m jaxformer is the command jaxformer."""

import os
import sys

if __name__ == "__main__":
    if not sys.flags.safe_path:  # Python looks into the working directory first, which may be a stranger's run
        here = sys.path.pop(0)
        if os.path.dirname(os.path.dirname(__file__)) == here:  # a checkout that is not installed
            sys.path.append(here)
    from jaxformer.commands.main import main

    main()
