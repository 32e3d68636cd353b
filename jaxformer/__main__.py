"""python -m jaxformer is the command jaxformer."""

import sys

if __name__ == "__main__":
    if not sys.flags.safe_path:  # Python looks into the working directory first, which may be a stranger's run
        sys.path.append(sys.path.pop(0))
    from jaxformer.commands.main import main

    main()
