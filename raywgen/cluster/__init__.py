"""Jobs on Ray clusters, and clusters for them: preflight, submission, manifests."""

from raywgen.cluster.render import render
from raywgen.cluster.settings import RenderConfig
from raywgen.cluster.submit import Job, submit
from raywgen.training.reach import ClusterError

__all__ = ["ClusterError", "Job", "RenderConfig", "render", "submit"]
