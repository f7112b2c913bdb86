"""PyTorch: `agnmpi.torch.Run` trains a model of yours, by your optimizer, in your loop; see examples/README.md."""

try:
    from .frameworks.torch import Run as Run
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ModuleNotFoundError("agnmpi.torch needs PyTorch: pip install 'agnmpi[torch]'", name="torch") from None
