"""``python -m lightgptq``."""

from lightgptq.cli import main

if __name__ == "__main__":
    main()
