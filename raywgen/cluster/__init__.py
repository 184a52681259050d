"""Jobs on Ray clusters, and clusters for them: preflight, submission, manifests.

Nothing is imported here: `connect` and most of `submit` need no torch, and commands should not wait for it.
"""
