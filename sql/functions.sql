-- The SQL surface: the verbs in the schema chosen at CREATE EXTENSION, everything else in
-- rekey. Each function stands beside its comment; the code is in src/api/. None is STRICT
-- where a NULL argument needs an error of its own.

-- The verbs.

CREATE FUNCTION encrypt_col(value text, key_name text DEFAULT '', context text DEFAULT '') RETURNS bytea
    LANGUAGE c VOLATILE PARALLEL RESTRICTED COST 20 AS 'MODULE_PATHNAME', 'encrypt_col_text_wrapper';
COMMENT ON FUNCTION encrypt_col(text, text, text) IS
    'Seals a text value under the active slot of the key; an empty key_name is rekey.default_key, an empty context binds nothing';

CREATE FUNCTION encrypt_col(value bytea, key_name text DEFAULT '', context text DEFAULT '') RETURNS bytea
    LANGUAGE c VOLATILE PARALLEL RESTRICTED COST 20 AS 'MODULE_PATHNAME', 'encrypt_col_bytea_wrapper';
COMMENT ON FUNCTION encrypt_col(bytea, text, text) IS
    'Seals a bytea value under the active slot of the key';

CREATE FUNCTION encrypt_col(value anyelement, key_name text DEFAULT '', context text DEFAULT '') RETURNS bytea
    LANGUAGE c VOLATILE PARALLEL RESTRICTED COST 20 AS 'MODULE_PATHNAME', 'encrypt_col_anyelement_wrapper';
COMMENT ON FUNCTION encrypt_col(anyelement, text, text) IS
    'Seals a value of any other type, remembering its type, under the active slot of the key';

CREATE FUNCTION decrypt_col(envelope bytea, context text DEFAULT '') RETURNS text
    LANGUAGE c STABLE PARALLEL SAFE COST 20 AS 'MODULE_PATHNAME', 'decrypt_col_wrapper';
COMMENT ON FUNCTION decrypt_col(bytea, text) IS
    'Opens an envelope with the slot that its header names, and returns the text form of the value';

CREATE FUNCTION decrypt_col_as(envelope bytea, as_type anyelement, context text DEFAULT '') RETURNS anyelement
    LANGUAGE c STABLE PARALLEL SAFE COST 20 AS 'MODULE_PATHNAME', 'decrypt_col_as_wrapper';
COMMENT ON FUNCTION decrypt_col_as(bytea, anyelement, text) IS
    'Opens an envelope as a value of the type of as_type: decrypt_col_as(c, NULL::numeric)';

CREATE FUNCTION rotate_key(key_name text DEFAULT '', reason text DEFAULT '') RETURNS bigint
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'rotate_key_wrapper';
COMMENT ON FUNCTION rotate_key(text, text) IS
    'Makes a new slot active, keeps the old one readable, and returns the new slot id';

-- Equality search.

CREATE FUNCTION fingerprint_col(value text, key_name text, context text DEFAULT '') RETURNS bytea
    LANGUAGE c VOLATILE PARALLEL RESTRICTED COST 20 AS 'MODULE_PATHNAME', 'fingerprint_col_wrapper';
COMMENT ON FUNCTION fingerprint_col(text, text, text) IS
    'Keyed digest of a value under the active slot of a lookup key, to be stored beside the sealed value and found with rekey.fingerprints; normalise the value first';

CREATE FUNCTION rekey.fingerprints(value text, key_name text, context text DEFAULT '') RETURNS bytea[]
    LANGUAGE c STABLE PARALLEL SAFE COST 20 AS 'MODULE_PATHNAME', 'fingerprints_wrapper';
COMMENT ON FUNCTION rekey.fingerprints(text, text, text) IS
    'All fingerprints under which a value may be stored, the active slot''s first: WHERE email_fp = ANY (rekey.fingerprints($1, ''email_lookup''))';

CREATE FUNCTION rekey.verify_fingerprint(value text, fingerprint bytea, context text DEFAULT '') RETURNS boolean
    LANGUAGE c STABLE PARALLEL SAFE COST 20 AS 'MODULE_PATHNAME', 'verify_fingerprint_wrapper';
COMMENT ON FUNCTION rekey.verify_fingerprint(text, bytea, text) IS
    'Whether a fingerprint is that of the value, by the slot that it names';

CREATE FUNCTION rekey.fingerprint_slot_id(fingerprint bytea) RETURNS bigint
    LANGUAGE c IMMUTABLE PARALLEL SAFE LEAKPROOF AS 'MODULE_PATHNAME', 'fingerprint_slot_id_wrapper';
COMMENT ON FUNCTION rekey.fingerprint_slot_id(bytea) IS
    'Slot id in front of a fingerprint; NULL for anything else';

-- Headers: what an envelope says of itself, without a key.

CREATE FUNCTION rekey.slot_id(envelope bytea) RETURNS bigint
    LANGUAGE c IMMUTABLE PARALLEL SAFE LEAKPROOF AS 'MODULE_PATHNAME', 'slot_id_wrapper';
COMMENT ON FUNCTION rekey.slot_id(bytea) IS
    'Slot id in the header of an envelope; NULL for anything else';

CREATE FUNCTION rekey.is_envelope(envelope bytea) RETURNS boolean
    LANGUAGE c IMMUTABLE PARALLEL SAFE LEAKPROOF AS 'MODULE_PATHNAME', 'is_envelope_wrapper';
COMMENT ON FUNCTION rekey.is_envelope(bytea) IS
    'Whether the bytes begin with a well-formed envelope header';

CREATE FUNCTION rekey.context(VARIADIC parts text[]) RETURNS text
    LANGUAGE c IMMUTABLE PARALLEL SAFE AS 'MODULE_PATHNAME', 'context_wrapper';
COMMENT ON FUNCTION rekey.context(text[]) IS
    'One context out of several parts, injectively: rekey.context(''customer.email'', id::text)';

CREATE FUNCTION rekey.describe(envelope bytea, OUT format integer, OUT suite integer, OUT kind text, OUT context_bound boolean,
        OUT slot_id bigint, OUT key_name text, OUT state text, OUT value_bytes integer) RETURNS record
    LANGUAGE c STABLE PARALLEL SAFE AS 'MODULE_PATHNAME', 'describe_wrapper';
COMMENT ON FUNCTION rekey.describe(bytea) IS
    'What the header of an envelope says; key_name and state only to those who hold a privilege on the key';

CREATE FUNCTION rekey.can_open(envelope bytea, context text DEFAULT '') RETURNS boolean
    LANGUAGE c STABLE PARALLEL SAFE COST 20 AS 'MODULE_PATHNAME', 'can_open_wrapper';
COMMENT ON FUNCTION rekey.can_open(bytea, text) IS
    'Whether decrypt_col would succeed for the caller';

-- Keys and their policy.

CREATE FUNCTION rekey.create_key(key_name text, grace interval DEFAULT '30 days', max_age interval DEFAULT '0',
        if_not_exists boolean DEFAULT false, comment text DEFAULT '', purpose text DEFAULT 'seal') RETURNS bigint
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'create_key_wrapper';
COMMENT ON FUNCTION rekey.create_key(text, interval, interval, boolean, text, text) IS
    'Creates a key with its first active slot, owned by the current user, and returns the slot id';

CREATE FUNCTION rekey.set_policy(key_name text, grace interval DEFAULT NULL, max_age interval DEFAULT NULL,
        after_drain text DEFAULT NULL, require_context boolean DEFAULT NULL, custodian text DEFAULT NULL) RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'set_policy_wrapper';
COMMENT ON FUNCTION rekey.set_policy(text, interval, interval, text, boolean, text) IS
    'Changes the policy of a key; NULL leaves a setting as it is';

CREATE FUNCTION rekey.prepare_key(key_name text) RETURNS bigint
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'prepare_key_wrapper';
COMMENT ON FUNCTION rekey.prepare_key(text) IS
    'Stages a pending slot ahead of a rotation, so that every standby knows it before its first use, and returns its id';

CREATE FUNCTION rekey.promote_key(key_name text, wait_for_standbys boolean DEFAULT false,
        wait_timeout interval DEFAULT '30 s') RETURNS bigint
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'promote_key_wrapper';
COMMENT ON FUNCTION rekey.promote_key(text, boolean, interval) IS
    'Makes the pending slot active, on demand once every standby has replayed it, and returns its id';

CREATE FUNCTION rekey.rollback_rotation(key_name text) RETURNS bigint
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'rollback_rotation_wrapper';
COMMENT ON FUNCTION rekey.rollback_rotation(text) IS
    'Makes the latest superseded slot active again and returns its id';

CREATE FUNCTION rekey.shred_key(key_name text, reason text) RETURNS integer
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'shred_key_wrapper';
COMMENT ON FUNCTION rekey.shred_key(text, text) IS
    'Destroys all slots of a key, the active one too: what it sealed can never be opened here again';

CREATE FUNCTION rekey.drop_key(key_name text) RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'drop_key_wrapper';
COMMENT ON FUNCTION rekey.drop_key(text) IS
    'Removes a key whose slots are all pending or destroyed; tombstones stay';

-- Many keys at once.

CREATE FUNCTION rekey.create_keys(key_names text[], like_key text, if_not_exists boolean DEFAULT false) RETURNS bigint
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'create_keys_wrapper';
COMMENT ON FUNCTION rekey.create_keys(text[], text, boolean) IS
    'Creates keys with the policy and the grants of another key, owned by the current user; returns how many are new';

CREATE FUNCTION rekey.rotate_keys(older_than timestamptz, max_keys integer DEFAULT 100, pattern text DEFAULT '%',
        reason text DEFAULT '', OUT rotated bigint, OUT remaining bigint) RETURNS record
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'rotate_keys_wrapper';
COMMENT ON FUNCTION rekey.rotate_keys(timestamptz, integer, text, text) IS
    'Rotates the keys like pattern that the caller may rotate and whose active slot is older, the oldest first, at most max_keys of them; says how many remain. Without a pattern those that seal';

-- Slots.

CREATE FUNCTION rekey.disable_slot(slot_id bigint, force boolean DEFAULT false) RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'disable_slot_wrapper';
COMMENT ON FUNCTION rekey.disable_slot(bigint, boolean) IS
    'Closes a drained slot reversibly: the test before destroy_slot; force (superuser) skips the proof';

CREATE FUNCTION rekey.enable_slot(slot_id bigint) RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'enable_slot_wrapper';
COMMENT ON FUNCTION rekey.enable_slot(bigint) IS
    'Reopens a disabled slot';

CREATE FUNCTION rekey.destroy_slot(slot_id bigint, force boolean DEFAULT false) RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'destroy_slot_wrapper';
COMMENT ON FUNCTION rekey.destroy_slot(bigint, boolean) IS
    'Deletes the wrapped keys of a slot for ever; force (superuser) skips the proof';

CREATE FUNCTION rekey.mark_compromised(slot_id bigint, reason text) RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'mark_compromised_wrapper';
COMMENT ON FUNCTION rekey.mark_compromised(bigint, text) IS
    'Reports a slot as compromised: it seals no more, is never promoted or rolled back to, and any proof is void';

CREATE FUNCTION rekey.restore_slot(slot_id bigint, wrapped_key bytea, root_id text, reason text) RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'restore_slot_wrapper';
COMMENT ON FUNCTION rekey.restore_slot(bigint, bytea, text, text) IS
    'Brings a destroyed slot back as previous, with its wrapped key out of a backup (rekey.slot_wrap); the tombstone must vouch for it';

-- Keys between databases.

CREATE FUNCTION rekey.export_key(key_name text, transport_key bytea DEFAULT NULL) RETURNS jsonb
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'export_key_wrapper';
COMMENT ON FUNCTION rekey.export_key(text, bytea) IS
    'A key with all its slots for another database: wrapped under the root keys here, or under a one-time transport key of 32 random bytes (pass it as a bind parameter)';

CREATE FUNCTION rekey.import_key(exported jsonb, transport_key bytea DEFAULT NULL, key_name text DEFAULT NULL) RETURNS integer
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'import_key_wrapper';
COMMENT ON FUNCTION rekey.import_key(jsonb, bytea, text) IS
    'Takes in what export_key gave, under the root keys of this server and, if given, another name; returns the number of slots that are new here';

-- Privileges.

CREATE FUNCTION rekey.grant_key(key_name text, role_name text, privileges text[]) RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'grant_key_wrapper';
COMMENT ON FUNCTION rekey.grant_key(text, text, text[]) IS
    'Grants manage, rotate, encrypt or decrypt on a key (owner: by an owner); role public is everyone';

CREATE FUNCTION rekey.revoke_key(key_name text, role_name text, privileges text[]) RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'revoke_key_wrapper';
COMMENT ON FUNCTION rekey.revoke_key(text, text, text[]) IS
    'Takes privileges on a key back';

CREATE FUNCTION rekey.has_key_privilege(key_name text, privilege text) RETURNS boolean
    LANGUAGE c STABLE PARALLEL SAFE AS 'MODULE_PATHNAME', 'has_key_privilege_wrapper';
COMMENT ON FUNCTION rekey.has_key_privilege(text, text) IS
    'Whether the current user holds a privilege on a key';

CREATE FUNCTION rekey.has_key_privilege(role_name text, key_name text, privilege text) RETURNS boolean
    LANGUAGE c STABLE PARALLEL SAFE AS 'MODULE_PATHNAME', 'has_key_privilege_role_wrapper';
COMMENT ON FUNCTION rekey.has_key_privilege(text, text, text) IS
    'Whether a role holds a privilege on a key';

CREATE FUNCTION rekey.key_visible(key_name text) RETURNS boolean
    LANGUAGE c STABLE PARALLEL SAFE AS 'MODULE_PATHNAME', 'key_visible_wrapper';
COMMENT ON FUNCTION rekey.key_visible(text) IS
    'Whether the views show a key to the current user';

-- Root keys.

CREATE FUNCTION rekey.init_root_key(root_id text DEFAULT '') RETURNS text
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'init_root_key_wrapper';
COMMENT ON FUNCTION rekey.init_root_key(text) IS
    'Adopts the root key of this server, creating rekey.root_key_file if there is none, and returns the root id';

CREATE FUNCTION rekey.rotate_root_key(root_id text DEFAULT '') RETURNS text
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'rotate_root_key_wrapper';
COMMENT ON FUNCTION rekey.rotate_root_key(text) IS
    'Wraps every slot under another root key as well and makes it active: the one named, or the next one of rekey.root_key_file, which it adds if there is none; new adds one in any case; returns its id';

CREATE FUNCTION rekey.retire_root_key(root_id text) RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'retire_root_key_wrapper';
COMMENT ON FUNCTION rekey.retire_root_key(text) IS
    'Deletes what a superseded root key wraps here, once every slot opens under another one that this server holds';

CREATE FUNCTION rekey.mark_compromised_root(root_id text, reason text) RETURNS integer
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'mark_compromised_root_wrapper';
COMMENT ON FUNCTION rekey.mark_compromised_root(text, text) IS
    'Reports a superseded root key, and every slot that it ever wrapped here, as compromised; active slots rotate at once; returns the number of slots';

CREATE FUNCTION rekey.reload_root_keys() RETURNS integer
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'reload_root_keys_wrapper';
COMMENT ON FUNCTION rekey.reload_root_keys() IS
    'Reads the root keys again in this session and returns how many it holds';

CREATE FUNCTION rekey.ready() RETURNS boolean
    LANGUAGE c STABLE PARALLEL SAFE AS 'MODULE_PATHNAME', 'ready_wrapper';
COMMENT ON FUNCTION rekey.ready() IS
    'Whether this server holds the active root key: for health checks';

CREATE FUNCTION rekey.holds_root_key(root_id text) RETURNS boolean
    LANGUAGE c STABLE PARALLEL SAFE AS 'MODULE_PATHNAME', 'holds_root_key_wrapper';
COMMENT ON FUNCTION rekey.holds_root_key(text) IS
    'Whether this server holds a root key (pg_monitor; NULL for others)';

-- Registered columns, their re-encryption and the quarantine.

CREATE FUNCTION rekey.register_column(table_name regclass, column_name name, context text DEFAULT '',
        fire_triggers boolean DEFAULT false) RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'register_column_wrapper';
COMMENT ON FUNCTION rekey.register_column(regclass, name, text, boolean) IS
    'Registers a column of envelopes for re-encryption; context is an expression over the row: rekey.context(''customer.email'', id::text)';

CREATE FUNCTION rekey.register_fingerprint(table_name regclass, column_name name, sealed_column name,
        key_name text, sealed_key text DEFAULT '', normalise text DEFAULT '', context text DEFAULT '') RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'register_fingerprint_wrapper';
COMMENT ON FUNCTION rekey.register_fingerprint(regclass, name, name, text, text, text, text) IS
    'Registers a column of fingerprints: after a rotation of its lookup key they are made again from the registered sealed column beside it; normalise is an expression over the value, $1: lower($1); rekey.unregister_column ends it';

CREATE FUNCTION rekey.unregister_column(table_name regclass, column_name name) RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'unregister_column_wrapper';
COMMENT ON FUNCTION rekey.unregister_column(regclass, name) IS
    'Ends the registration of a column; its envelopes stay as they are';

CREATE FUNCTION rekey.reencrypt_step(table_name regclass, first boolean, OUT message text,
        OUT rewritten bigint, OUT finished boolean) RETURNS record
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'reencrypt_step_wrapper';
COMMENT ON FUNCTION rekey.reencrypt_step(regclass, boolean) IS
    'One transaction''s worth of re-encryption, for CALL rekey.reencrypt()';

CREATE FUNCTION rekey.reencrypt_put_off(sqlstate text) RETURNS boolean
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'reencrypt_put_off_wrapper';
COMMENT ON FUNCTION rekey.reencrypt_put_off(text) IS
    'After a step that failed: has the table rest at which it did, for CALL rekey.reencrypt(); false when no table is to blame';

-- A table at which a step fails rests, and the others go on; the error comes at the end.
-- Without SET and SECURITY DEFINER: with either, COMMIT is refused. Every name is qualified, and
-- no operator is looked up but integer addition in pg_catalog.
CREATE PROCEDURE rekey.reencrypt(table_name regclass DEFAULT NULL)
    LANGUAGE plpgsql AS $$
DECLARE
    step record;
    rows_done bigint := 0;
    first boolean := true;
    said pg_catalog.text := '';
    said_at pg_catalog.timestamptz := pg_catalog.clock_timestamp();
    failed boolean := false;
    state pg_catalog.text;
    message pg_catalog.text;
    detail pg_catalog.text;
    hint pg_catalog.text;
BEGIN
    LOOP
        BEGIN
            SELECT s.message, s.rewritten, s.finished INTO step
              FROM rekey.reencrypt_step(table_name, first) AS s;
        EXCEPTION WHEN OTHERS THEN
            IF NOT rekey.reencrypt_put_off(SQLSTATE) THEN
                RAISE;
            END IF;
            failed := true;
            GET STACKED DIAGNOSTICS state = RETURNED_SQLSTATE, message = MESSAGE_TEXT,
                detail = PG_EXCEPTION_DETAIL, hint = PG_EXCEPTION_HINT;
            SELECT '' AS message, 0::pg_catalog.int8 AS rewritten, false AS finished INTO step;
        END;
        first := false;
        rows_done := rows_done OPERATOR(pg_catalog.+) step.rewritten;
        IF step.message OPERATOR(pg_catalog.<>) '' AND step.message OPERATOR(pg_catalog.<>) said
           AND (step.rewritten OPERATOR(pg_catalog.=) 0
                OR step.finished
                OR pg_catalog.clock_timestamp() OPERATOR(pg_catalog.>)
                   (said_at OPERATOR(pg_catalog.+) '1 second'::pg_catalog.interval)) THEN
            RAISE NOTICE '%, % rows re-encrypted', step.message, rows_done;
            said := step.message;
            said_at := pg_catalog.clock_timestamp();
        END IF;
        EXIT WHEN step.finished;
        COMMIT;
    END LOOP;
    IF failed THEN
        COMMIT;
        RAISE EXCEPTION USING ERRCODE = state, MESSAGE = message, HINT = hint,
            DETAIL = CASE WHEN detail OPERATOR(pg_catalog.=) '' THEN 'One table was left.'
                          ELSE detail END;
    END IF;
    RAISE NOTICE 'done, % rows re-encrypted', rows_done;
END
$$;
COMMENT ON PROCEDURE rekey.reencrypt(regclass) IS
    'Does the background worker''s work in the foreground, for one table or for all, and commits after each batch';

CREATE FUNCTION rekey.pause(table_name regclass DEFAULT NULL, until timestamptz DEFAULT NULL,
        reason text DEFAULT '') RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'pause_wrapper';
COMMENT ON FUNCTION rekey.pause(regclass, timestamptz, text) IS
    'Pauses re-encryption of a table, or of all, until a time or until resume()';

CREATE FUNCTION rekey.resume(table_name regclass DEFAULT NULL) RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'resume_wrapper';
COMMENT ON FUNCTION rekey.resume(regclass) IS
    'Ends what pause() began';

CREATE FUNCTION rekey.retry_quarantine() RETURNS bigint
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'retry_quarantine_wrapper';
COMMENT ON FUNCTION rekey.retry_quarantine() IS
    'Has the rows under quarantine in the caller''s tables tried again at once, and returns how many';

CREATE FUNCTION rekey.dismiss_quarantine(quarantine_id bigint, reason text) RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'dismiss_quarantine_wrapper';
COMMENT ON FUNCTION rekey.dismiss_quarantine(bigint, text) IS
    'Decides to do without the value of a row; proofs list it as an exception';

CREATE FUNCTION rekey.envelope_places() RETURNS text
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'envelope_places_wrapper';
COMMENT ON FUNCTION rekey.envelope_places() IS
    'What find_envelopes returns, as JSON';

CREATE FUNCTION rekey.find_envelopes() RETURNS TABLE (table_name text, column_name text, slot_id bigint, envelopes bigint)
    LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT p.table_name, p.column_name, p.slot_id, p.envelopes
      FROM pg_catalog.jsonb_to_recordset(rekey.envelope_places()::jsonb)
           AS p(table_name text, column_name text, slot_id bigint, envelopes bigint)
$$;
COMMENT ON FUNCTION rekey.find_envelopes() IS
    'Envelopes and fingerprints in bytea columns, materialized views and defaults that nobody has registered; reads every table';

CREATE FUNCTION rekey.rotation_forecast(key_name text) RETURNS text
    LANGUAGE c STABLE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'rotation_forecast_wrapper';
COMMENT ON FUNCTION rekey.rotation_forecast(text) IS
    'What explain_rotation returns, as JSON';

CREATE FUNCTION rekey.explain_rotation(key_name text DEFAULT '') RETURNS TABLE (item text, object text, figure text, note text)
    LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT f.item, f.object, f.figure, f.note
      FROM ROWS FROM (pg_catalog.jsonb_to_recordset(rekey.rotation_forecast(key_name)::jsonb)
               AS (item text, object text, figure text, note text)) WITH ORDINALITY
           AS f(item, object, figure, note, place)
     ORDER BY f.place
$$;
COMMENT ON FUNCTION rekey.explain_rotation(text) IS
    'What a rotation would cost now: rows, bytes, WAL and time for each table, what else sees it and what would hold it up; reads samples, changes nothing';

-- Re-encryption on touch.

CREATE FUNCTION rekey.is_stale(envelope bytea) RETURNS boolean
    LANGUAGE c STABLE PARALLEL SAFE AS 'MODULE_PATHNAME', 'is_stale_wrapper';
COMMENT ON FUNCTION rekey.is_stale(bytea) IS
    'Whether the slot in the header is not the active slot of its key, which has one; false for anything else, NULL for NULL';

CREATE FUNCTION rekey.is_closed(envelope bytea) RETURNS boolean
    LANGUAGE c STABLE PARALLEL SAFE AS 'MODULE_PATHNAME', 'is_closed_wrapper';
COMMENT ON FUNCTION rekey.is_closed(bytea) IS
    'Whether the slot of an envelope or a fingerprint is drained, disabled or destroyed; false for anything else, NULL for NULL';

CREATE FUNCTION rekey.touch() RETURNS trigger
    LANGUAGE c AS 'MODULE_PATHNAME', 'touch_wrapper';
COMMENT ON FUNCTION rekey.touch() IS
    'Trigger of rekey.enable_touch: re-encrypts the stale envelopes of a row that is updated anyway';

CREATE FUNCTION rekey.enable_touch(table_name regclass, refuse_closed boolean DEFAULT false) RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'enable_touch_wrapper';
COMMENT ON FUNCTION rekey.enable_touch(regclass, boolean) IS
    'Has every UPDATE of a row re-encrypt its stale envelopes too; refuse_closed: nothing is stored under a drained, disabled or destroyed slot any more';

CREATE FUNCTION rekey.disable_touch(table_name regclass) RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'disable_touch_wrapper';
COMMENT ON FUNCTION rekey.disable_touch(regclass) IS
    'Ends what enable_touch() began';

-- Live columns: from plaintext to envelopes and back while the table is in use.

CREATE FUNCTION rekey.encrypt_column(table_name regclass, column_name name, into_column name,
        key_name text DEFAULT '', context text DEFAULT '', source text DEFAULT '') RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'encrypt_column_wrapper';
COMMENT ON FUNCTION rekey.encrypt_column(regclass, name, name, text, text, text) IS
    'Begins to seal a live column: adds into_column, registers it with its context, and has every write sealed into it as well; the worker fills the other rows. source: an expression over the row that gives the value, for a column that is not in the clear';

CREATE FUNCTION rekey.finish_encrypt_column(table_name regclass, column_name name) RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'finish_encrypt_column_wrapper';
COMMENT ON FUNCTION rekey.finish_encrypt_column(regclass, name) IS
    'Ends what encrypt_column() began, once every row is sealed and opens to the same value; the old column stays, for you to drop';

CREATE FUNCTION rekey.decrypt_column(table_name regclass, column_name name, into_column name) RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'decrypt_column_wrapper';
COMMENT ON FUNCTION rekey.decrypt_column(regclass, name, name) IS
    'Begins to open a registered column: adds into_column, of type text unless it is there, and has every write opened into it as well; the worker fills the other rows';

CREATE FUNCTION rekey.finish_decrypt_column(table_name regclass, column_name name) RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'finish_decrypt_column_wrapper';
COMMENT ON FUNCTION rekey.finish_decrypt_column(regclass, name) IS
    'Ends what decrypt_column() began, once every row is opened, and unregisters the sealed column, for you to drop';

CREATE FUNCTION rekey.live() RETURNS trigger
    LANGUAGE c AS 'MODULE_PATHNAME', 'live_wrapper';
COMMENT ON FUNCTION rekey.live() IS
    'Trigger of encrypt_column and decrypt_column: keeps one column of a row up to date with another';

-- Views.

CREATE FUNCTION rekey.decrypt_col_as(envelope bytea, as_type anyelement, context text DEFAULT '') RETURNS anyelement
    LANGUAGE c STABLE PARALLEL SAFE COST 20 AS 'MODULE_PATHNAME', 'decrypt_col_as_wrapper';
COMMENT ON FUNCTION rekey.decrypt_col_as(bytea, anyelement, text) IS
    'decrypt_col_as for views, in a schema where nobody can make a function that is taken for it';

CREATE FUNCTION rekey.write_view() RETURNS trigger
    LANGUAGE c AS 'MODULE_PATHNAME', 'write_view_wrapper';
COMMENT ON FUNCTION rekey.write_view() IS
    'Trigger of rekey.create_view: writes to the table what is written to the view, sealed; arguments: a key for each opened column';

CREATE FUNCTION rekey.create_view(table_name regclass, view_name text, key_name text DEFAULT '',
        columns jsonb DEFAULT '{}') RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'create_view_wrapper';
COMMENT ON FUNCTION rekey.create_view(regclass, text, text, jsonb) IS
    'Makes a view that shows the registered columns of a table opened and seals what is written to it; columns: {"salary": {"type": "numeric", "key": "pay"}}';

CREATE FUNCTION rekey.registered_attnum(table_name regclass, column_name text, attnum smallint,
        stamp text) RETURNS smallint
    LANGUAGE c STABLE PARALLEL SAFE AS 'MODULE_PATHNAME', 'registered_attnum_wrapper';
COMMENT ON FUNCTION rekey.registered_attnum(regclass, text, smallint, text) IS
    'For the view columns: the present number of a registered column; NULL when it is gone';

CREATE FUNCTION rekey.table_stamp(table_name regclass) RETURNS text
    LANGUAGE c STABLE PARALLEL SAFE AS 'MODULE_PATHNAME', 'table_stamp_wrapper';
COMMENT ON FUNCTION rekey.table_stamp(regclass) IS
    'What tells this table from any other that has had or will have its OID; NULL for none';

CREATE FUNCTION rekey.table_visible(table_name regclass) RETURNS boolean
    LANGUAGE c STABLE PARALLEL SAFE AS 'MODULE_PATHNAME', 'table_visible_wrapper';
COMMENT ON FUNCTION rekey.table_visible(regclass) IS
    'Whether the views show a table''s re-encryption to the current user: its owner and pg_monitor';

CREATE FUNCTION rekey.proof_scan(table_name regclass, OUT since timestamptz, OUT blocks_done bigint,
        OUT blocks bigint) RETURNS record
    LANGUAGE c VOLATILE STRICT PARALLEL RESTRICTED AS 'MODULE_PATHNAME', 'proof_scan_wrapper';
COMMENT ON FUNCTION rekey.proof_scan(regclass) IS
    'Since when the worker scans for a proof, and how far it is in the table it is at (for its owner and pg_monitor)';

CREATE FUNCTION rekey.evidence(key_name text DEFAULT '', since timestamptz DEFAULT NULL) RETURNS jsonb
    LANGUAGE c STABLE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'evidence_wrapper';
COMMENT ON FUNCTION rekey.evidence(text, timestamptz) IS
    'What an auditor asks: inventory, cryptoperiods and whether they were kept, slots with dates and proofs, grants, root ids, acts; an empty key_name is all keys';

-- Watching it.

CREATE FUNCTION rekey.check_findings() RETURNS text
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'check_findings_wrapper';
COMMENT ON FUNCTION rekey.check_findings() IS
    'What check returns, as JSON';

CREATE FUNCTION rekey.check() RETURNS TABLE (severity text, object text, finding text, remedy text)
    LANGUAGE sql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
    SELECT f.severity, f.object, f.finding, f.remedy
      FROM pg_catalog.jsonb_to_recordset(rekey.check_findings()::jsonb)
           AS f(severity text, object text, finding text, remedy text)
$$;
COMMENT ON FUNCTION rekey.check() IS
    'What is wrong with keys, root keys, columns, settings and the worker here, the worst first, each with a remedy (pg_monitor); changes nothing';
