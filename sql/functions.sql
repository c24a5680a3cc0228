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
    'Wraps every slot under another root key as well and makes it active: the one named, or one that it adds to rekey.root_key_file; returns its id';

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
