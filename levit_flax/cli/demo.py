"""The command `levit-flax demo`."""


def demo() -> None:
    """Convert the model in the package, verify it, and classify photographs."""
    from levit_flax.demo import _run_demo

    _run_demo()
