"""`levit-flax demo`."""


def demo() -> None:
    """Convert the model inside the package, prove it right, and name what is in real photographs."""
    from levit_flax.demo import run_demo

    run_demo()
