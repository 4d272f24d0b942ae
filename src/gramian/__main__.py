"""`python -m gramian`, which is also what `accelerate launch -m gramian` runs."""

from gramian.cli.main import main

if __name__ == "__main__":
    main()
