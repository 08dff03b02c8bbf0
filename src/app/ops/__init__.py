"""Operations: the scheduler, liveness and readiness, logs, access and the dashboard."""
