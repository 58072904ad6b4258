"""What may pass: thresholds per category and stage, and named policies in a file."""

from tta_middleware.policy.notices import DEFAULT_NOTICE
from tta_middleware.policy.policy import (
    REPAIR_MARGIN,
    STAGES,
    Decision,
    Policy,
    Stage,
    StagePolicies,
)

__all__ = ["DEFAULT_NOTICE", "REPAIR_MARGIN", "STAGES", "Decision", "Policy", "Stage", "StagePolicies"]
