"""The wire: how a TorchServe request becomes an engine request and its tokens a reply."""
