"""``python -m mapconv``."""

from mapconv.cli import run

if __name__ == "__main__":
    run()
