"""The variables of the pulls from AppMetrica and Amplitude; see `app.config.variables`."""

from app.config import kinds
from app.config.variable import of

APPMETRICA = of(
    "appmetrica",
    (
        "base_url",
        "APPMETRICA_BASE_URL",
        kinds.HTTP_URL,
        "https://api.appmetrica.yandex.com",
        "where AppMetrica answers",
    ),
    ("api_key", "APPMETRICA_API_KEY", kinds.SECRET_OR_NONE, "", "OAuth token of AppMetrica", "appmetrica is off"),
    ("application_id", "APPMETRICA_APPLICATION_ID", kinds.whole(1, 2**63 - 1), "", "application to export"),
    (
        "poll_interval_seconds",
        "APPMETRICA_POLL_INTERVAL_SECONDS",
        kinds.seconds(1, 3600),
        "5",
        "time between questions for a file; a day allows 5,000 requests",
    ),
    (
        "poll_timeout_seconds",
        "APPMETRICA_POLL_TIMEOUT_SECONDS",
        kinds.seconds(1, 86_400),
        "300",
        "how long one call waits; the export itself goes on and can be asked for again",
    ),
    (
        "daily_calls",
        "APPMETRICA_DAILY_CALLS",
        kinds.whole(1, 1_000_000),
        "5000",
        "calls that a day UTC may have; the service allows an account 5,000",
    ),
    (
        "resources",
        "APPMETRICA_RESOURCES",
        kinds.APPMETRICA_RESOURCES,
        "events",
        "what to pull; all of it lands as objects, events also in the warehouse",
    ),
    (
        "timezone",
        "APPMETRICA_TIMEZONE",
        kinds.TIMEZONE,
        "",
        "time zone of the application, such as Europe/Moscow",
        "asked of the service",
    ),
    ("interval_seconds", "APPMETRICA_INTERVAL_SECONDS", kinds.whole(1, 86_400), "3600", "time between runs"),
    (
        "lookback_days",
        "APPMETRICA_LOOKBACK_DAYS",
        kinds.whole(0, 360),
        "7",
        "how far back a resource starts that was never pulled",
    ),
    (
        "recount_days",
        "APPMETRICA_RECOUNT_DAYS",
        kinds.whole(0, 366),
        "15",
        "days of receipt that are counted again once a day, for rows that arrive late; 0 = off",
    ),
)

AMPLITUDE = of(
    "amplitude",
    (
        "base_url",
        "AMPLITUDE_BASE_URL",
        kinds.HTTP_URL,
        "https://amplitude.com",
        "https://analytics.eu.amplitude.com for EU residency",
    ),
    ("web_client_id", "AMPLITUDE_WEB_CLIENT_ID", kinds.SECRET_OR_NONE, "", "API key of the web project", "web is off"),
    ("web_secret_key", "AMPLITUDE_WEB_SECRET_KEY", kinds.SECRET_OR_NONE, "", "its secret key"),
    (
        "mobile_client_id",
        "AMPLITUDE_MOBILE_CLIENT_ID",
        kinds.SECRET_OR_NONE,
        "",
        "API key of the mobile project",
        "mobile is off",
    ),
    ("mobile_secret_key", "AMPLITUDE_MOBILE_SECRET_KEY", kinds.SECRET_OR_NONE, "", "its secret key"),
    ("interval_seconds", "AMPLITUDE_INTERVAL_SECONDS", kinds.whole(1, 86_400), "3600", "time between runs"),
    (
        "lookback_days",
        "AMPLITUDE_LOOKBACK_DAYS",
        kinds.whole(0, 360),
        "7",
        "how far back a source starts that was never pulled, from the Monday of that week on",
    ),
)
