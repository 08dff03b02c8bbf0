-- Who is signed in to the dashboard: every process knows it, and a restart changes nothing.

-- name: session
-- The key that a token was given for, and the end of its session.
SELECT key_name, key_hash, ends_at FROM dashboard_sessions WHERE token_hash = :token_hash;

-- name: begin_session
-- Somebody signed in.
INSERT INTO dashboard_sessions (token_hash, key_name, key_hash, ends_at)
VALUES (:token_hash, :key_name, :key_hash, :ends_at);

-- name: end_session
-- Somebody signed out; nothing when the session has ended.
DELETE FROM dashboard_sessions WHERE token_hash = :token_hash;

-- name: forget_sessions
-- Sessions that have ended by themselves.
DELETE FROM dashboard_sessions WHERE ends_at <= :now;
