"""What a job, a profile or a transport would cost: rows, FLOPs, bytes, memory and hours, before anything is loaded."""

from .job_plan import plan_job
from .plan import Plan, Step
from .profile_plan import plan_profile, plan_transport

__all__ = ["Plan", "Step", "plan_job", "plan_profile", "plan_transport"]
