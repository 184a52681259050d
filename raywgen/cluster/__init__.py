"""Jobs on Ray clusters, and clusters for them: preflight, submission, manifests.

Nothing is imported here, so that commands that need only `connect` or `submit` do not wait for torch.
"""
