"""What is said of a model that has something which is not modelled."""

from __future__ import annotations

from samullm_plugin.checkpoints.hf_config import ConfigFile
from samullm_plugin.errors import InputError


class NotModelledError(InputError):
    """A model has a feature that its sizes depend on and that nobody here knows.

    Attributes:
        only_towers: the language model is known, and only what is beside it is not.
    """

    def __init__(self, file: ConfigFile, feature: str, *, only_towers: bool = False) -> None:
        """Name the file, the feature and the remedies."""
        super().__init__(
            f"{file.file}: {feature} is not modelled, so its sizes would be a guess; give them "
            "under `architecture` in app.yaml, or install transformers or vLLM in a version that "
            "knows the model"
        )
        self.only_towers = only_towers
