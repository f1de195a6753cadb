"""``python -m apportion``, as ``torchrun -m apportion`` needs it."""

from apportion.cli.main import main

if __name__ == "__main__":
    main()
