-- Dashboard sessions: shared by all processes, and they survive restarts.

-- name: session
-- The key that a token stands for, and the end of its session.
SELECT key_name, key_hash, ends_at FROM dashboard_sessions WHERE token_hash = :token_hash;

-- name: begin_session
-- Sign in.
INSERT INTO dashboard_sessions (token_hash, key_name, key_hash, ends_at)
VALUES (:token_hash, :key_name, :key_hash, :ends_at);

-- name: end_session
-- Sign out; does nothing if the session has ended.
DELETE FROM dashboard_sessions WHERE token_hash = :token_hash;

-- name: forget_sessions
-- Expired sessions.
DELETE FROM dashboard_sessions WHERE ends_at <= :now;
