-- Answers stored under an Idempotency-Key. The rows of a request and its answer are one transaction.

-- name: forget_requests
-- Answers too old for any retry.
DELETE FROM dwh_requests WHERE created_at < :before_at;

-- name: claim_request
-- Changes nothing if the key exists; waits for another transaction that is about to store it.
INSERT INTO dwh_requests (caller, key, fingerprint, created_at)
VALUES (:caller, :key, :fingerprint, :created_at)
ON CONFLICT (caller, key) DO NOTHING;

-- name: request
-- The request and the answer of a key.
SELECT fingerprint, answer FROM dwh_requests WHERE caller = :caller AND key = :key;

-- name: answer_request
-- Completes a claimed request, in the transaction that claimed it.
UPDATE dwh_requests SET answer = :answer WHERE caller = :caller AND key = :key;
