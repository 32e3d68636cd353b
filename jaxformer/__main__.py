"""python -m jaxformer is the command jaxformer."""

from jaxformer.commands.main import main

if __name__ == "__main__":
    main()
