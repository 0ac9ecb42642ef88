"""Other people's checkpoint files, turned into the folder that `tpserve.model` loads."""
