"""`python -m study`: the same as `python study/launch.py`."""

from study.cli import main

if __name__ == "__main__":
    main()
