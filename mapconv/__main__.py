"""``python -m mapconv``."""

from mapconv.cli import main

if __name__ == "__main__":
    main()
