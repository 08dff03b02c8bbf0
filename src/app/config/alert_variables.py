"""The variables of alerts and heartbeats; see `app.config.variables`."""

from app.config import kinds
from app.config.variable import of

YEAR_SECONDS = 366 * 86_400

ALERT = of(
    "alert",
    (
        "webhook_url",
        "ALERT_WEBHOOK_URL",
        kinds.SECRET_URL,
        "",
        "where a JSON body is posted when a job begins to fail, recovers or falls silent; Slack and Mattermost read it",
        "nobody is told",
    ),
    (
        "grace_seconds",
        "ALERT_GRACE_SECONDS",
        kinds.whole(1, YEAR_SECONDS),
        "900",
        "a job is stale when no run came to its end for its interval and this long",
    ),
    (
        "grace_by_job",
        "ALERT_GRACE_BY_JOB",
        kinds.JOB_SECONDS,
        "",
        "the same for single jobs, such as influx_to_s3=300",
        "ALERT_GRACE_SECONDS",
    ),
    (
        "heartbeat_urls",
        "HEARTBEAT_URLS",
        kinds.JOB_URLS,
        "",
        "addresses that are called after each good run, so that a monitor elsewhere notices silence",
        "none",
    ),
)
