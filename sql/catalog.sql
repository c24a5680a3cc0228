-- The protected catalog: every table of the extension, its indexes, its dump marks.
-- Only src/catalog/ reads and writes these tables. No row is inserted here: all but
-- barrier, progress_state, backfill_state and quarantine travel in dumps.

CREATE SCHEMA rekey;
COMMENT ON SCHEMA rekey IS 'pg_rekey: keys, slots, grants and the functions that administer them';

CREATE TABLE rekey.key (
    key_name        text COLLATE "C" PRIMARY KEY,
    purpose         text NOT NULL DEFAULT 'seal' CHECK (purpose IN ('seal', 'lookup')),
    grace           interval NOT NULL DEFAULT '30 days' CHECK (grace BETWEEN '0'::interval AND '1000 years'::interval),
    max_age         interval NOT NULL DEFAULT '0' CHECK (max_age BETWEEN '0'::interval AND '1000 years'::interval),
    after_drain     text NOT NULL DEFAULT 'keep' CHECK (after_drain IN ('keep', 'disable', 'destroy')),
    require_context boolean NOT NULL DEFAULT false,
    custodian       text NOT NULL DEFAULT '',
    comment         text NOT NULL DEFAULT '',
    created_at      timestamptz NOT NULL DEFAULT clock_timestamp(),
    shredded_at     timestamptz
);
COMMENT ON TABLE rekey.key IS 'Named keys and their rotation policy. Change them with rekey.create_key, set_policy and drop_key';
COMMENT ON COLUMN rekey.key.key_name IS 'Name that users write, for example pii; case-sensitive';
COMMENT ON COLUMN rekey.key.purpose IS 'seal: encrypts values; lookup: makes fingerprints';
COMMENT ON COLUMN rekey.key.grace IS 'How long a superseded slot stays, at least, after a rotation';
COMMENT ON COLUMN rekey.key.max_age IS 'Longest life of an active slot before it is rotated; 0 is never by age';
COMMENT ON COLUMN rekey.key.after_drain IS 'What happens to a slot that is proved unused and past its grace: keep, disable or destroy';
COMMENT ON COLUMN rekey.key.require_context IS 'Refuse to seal without a context';
COMMENT ON COLUMN rekey.key.custodian IS 'Person or team answerable for the key, for the auditor';
COMMENT ON COLUMN rekey.key.comment IS 'Free text';
COMMENT ON COLUMN rekey.key.created_at IS 'When the key was created';
COMMENT ON COLUMN rekey.key.shredded_at IS 'When all slots were shredded; the name is closed until drop_key';

CREATE TABLE rekey.key_slot (
    slot_id        bigint PRIMARY KEY CHECK (slot_id > 0),
    key_name       text COLLATE "C" NOT NULL,
    version        integer NOT NULL CHECK (version > 0),
    state          text NOT NULL
                   CHECK (state IN ('pending', 'active', 'previous', 'drained', 'disabled', 'destroyed')),
    check_value    bytea NOT NULL CHECK (octet_length(check_value) = 32),
    created_at     timestamptz NOT NULL DEFAULT clock_timestamp(),
    activated_at   timestamptz,
    superseded_at  timestamptz,
    drained_at     timestamptz,
    disabled_at    timestamptz,
    destroyed_at   timestamptz,
    compromised_at timestamptz,
    reason         text NOT NULL DEFAULT '',
    proof          jsonb
);
CREATE UNIQUE INDEX key_slot_version ON rekey.key_slot (key_name, version);
CREATE UNIQUE INDEX key_slot_active ON rekey.key_slot (key_name) WHERE state = 'active';
CREATE UNIQUE INDEX key_slot_pending ON rekey.key_slot (key_name) WHERE state = 'pending';
COMMENT ON INDEX rekey.key_slot_version IS 'Versions of a key are numbered once, tombstones included';
COMMENT ON INDEX rekey.key_slot_active IS 'At most one active slot per key, in every snapshot';
COMMENT ON INDEX rekey.key_slot_pending IS 'At most one staged slot per key';
COMMENT ON TABLE rekey.key_slot IS 'Versions of the keys: one data-encryption key each. Destroyed slots stay as tombstones, so that no id is ever used twice';
COMMENT ON COLUMN rekey.key_slot.slot_id IS 'Random id in 1 .. 2^63-1, written into the header of every envelope';
COMMENT ON COLUMN rekey.key_slot.key_name IS 'Key of this slot; no foreign key, tombstones outlive their key';
COMMENT ON COLUMN rekey.key_slot.version IS 'Number of the slot within its key, from 1';
COMMENT ON COLUMN rekey.key_slot.state IS 'pending, active, previous, drained, disabled or destroyed';
COMMENT ON COLUMN rekey.key_slot.check_value IS 'HMAC-SHA-256 under the slot''s key: proves that an unwrapped key is the right one';
COMMENT ON COLUMN rekey.key_slot.created_at IS 'When the slot was made';
COMMENT ON COLUMN rekey.key_slot.activated_at IS 'When it last became active';
COMMENT ON COLUMN rekey.key_slot.superseded_at IS 'When a rotation took its place; grace counts from here';
COMMENT ON COLUMN rekey.key_slot.drained_at IS 'When it was proved unused';
COMMENT ON COLUMN rekey.key_slot.disabled_at IS 'When it was disabled';
COMMENT ON COLUMN rekey.key_slot.destroyed_at IS 'When its wrapped keys were deleted';
COMMENT ON COLUMN rekey.key_slot.compromised_at IS 'When it was reported compromised';
COMMENT ON COLUMN rekey.key_slot.reason IS 'Why it was made, or why it ended';
COMMENT ON COLUMN rekey.key_slot.proof IS 'Evidence of the drain: time, LSN, horizon, tables, rows';

CREATE TABLE rekey.slot_wrap (
    slot_id     bigint NOT NULL CHECK (slot_id > 0),
    root_id     bytea NOT NULL CHECK (octet_length(root_id) = 16),
    wrapped_key bytea NOT NULL CHECK (octet_length(wrapped_key) = 73),
    PRIMARY KEY (slot_id, root_id)
);
COMMENT ON TABLE rekey.slot_wrap IS 'Data-encryption keys, wrapped under root keys that live outside the database';
COMMENT ON COLUMN rekey.slot_wrap.slot_id IS 'Slot whose key is wrapped';
COMMENT ON COLUMN rekey.slot_wrap.root_id IS 'Root key that wraps it';
COMMENT ON COLUMN rekey.slot_wrap.wrapped_key IS 'format 01, nonce, ciphertext, tag: XAES-256-GCM, bound to root id, slot id and key name';

CREATE TABLE rekey.root_key (
    root_id    bytea PRIMARY KEY CHECK (octet_length(root_id) = 16),
    root_check bytea NOT NULL CHECK (octet_length(root_check) = 32),
    state      text NOT NULL CHECK (state IN ('active', 'previous', 'compromised', 'retired')),
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    retired_at timestamptz
);
CREATE UNIQUE INDEX root_key_active ON rekey.root_key (state) WHERE state = 'active';
COMMENT ON INDEX rekey.root_key_active IS 'At most one active root key';
COMMENT ON TABLE rekey.root_key IS 'Root keys by id and check value; no key material';
COMMENT ON COLUMN rekey.root_key.root_id IS 'HMAC-SHA-256 of the root key, 16 bytes';
COMMENT ON COLUMN rekey.root_key.root_check IS 'A second HMAC of the root key: tells a wrong keyring from a right one';
COMMENT ON COLUMN rekey.root_key.state IS 'active, previous, compromised or retired';
COMMENT ON COLUMN rekey.root_key.created_at IS 'When this database adopted it';
COMMENT ON COLUMN rekey.root_key.retired_at IS 'When its wraps were deleted here';

CREATE TABLE rekey.key_grant (
    key_name   text COLLATE "C" NOT NULL,
    grantee    regrole NOT NULL,
    privilege  text NOT NULL CHECK (privilege IN ('owner', 'manage', 'rotate', 'encrypt', 'decrypt')),
    granted_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (key_name, grantee, privilege)
);
COMMENT ON TABLE rekey.key_grant IS 'Privileges on keys. Change them with rekey.grant_key and revoke_key';
COMMENT ON COLUMN rekey.key_grant.key_name IS 'Key';
COMMENT ON COLUMN rekey.key_grant.grantee IS 'Role; 0 is everyone';
COMMENT ON COLUMN rekey.key_grant.privilege IS 'owner, manage, rotate, encrypt or decrypt';
COMMENT ON COLUMN rekey.key_grant.granted_at IS 'When it was granted';

CREATE TABLE rekey.registered_column (
    table_name    regclass NOT NULL,
    column_name   text COLLATE "C" NOT NULL,
    context       text NOT NULL DEFAULT '',
    fire_triggers boolean NOT NULL DEFAULT false,
    attnum        smallint NOT NULL,
    stamp         text NOT NULL,
    registered_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    registered_by text NOT NULL DEFAULT current_user,
    sealed_column text COLLATE "C" NOT NULL DEFAULT '',
    sealed_attnum smallint NOT NULL DEFAULT 0,
    key_name      text COLLATE "C" NOT NULL DEFAULT '',
    sealed_key    text COLLATE "C" NOT NULL DEFAULT '',
    normalise     text NOT NULL DEFAULT '',
    PRIMARY KEY (table_name, column_name)
);
COMMENT ON TABLE rekey.registered_column IS 'Columns that the worker keeps under active slots: it re-encrypts envelopes and makes fingerprints again';
COMMENT ON COLUMN rekey.registered_column.table_name IS 'Table';
COMMENT ON COLUMN rekey.registered_column.column_name IS 'Name of the column; kept up to date for dumps';
COMMENT ON COLUMN rekey.registered_column.context IS 'Expression over the row that gives the bound context; empty for none';
COMMENT ON COLUMN rekey.registered_column.fire_triggers IS 'Whether the table''s triggers fire when the worker updates a row';
COMMENT ON COLUMN rekey.registered_column.attnum IS 'Number of the column, which follows a rename';
COMMENT ON COLUMN rekey.registered_column.stamp IS 'Server, OID and making of the table for which the number counts; in a restored or upgraded database it is another one, and the name counts';
COMMENT ON COLUMN rekey.registered_column.registered_at IS 'When it was registered';
COMMENT ON COLUMN rekey.registered_column.registered_by IS 'Who registered it';
COMMENT ON COLUMN rekey.registered_column.sealed_column IS 'In a row about fingerprints the sealed column beside them; kept up to date for dumps; else empty';
COMMENT ON COLUMN rekey.registered_column.sealed_attnum IS 'Number of the sealed column';
COMMENT ON COLUMN rekey.registered_column.key_name IS 'Lookup key of the fingerprints';
COMMENT ON COLUMN rekey.registered_column.sealed_key IS 'Key of the sealed values';
COMMENT ON COLUMN rekey.registered_column.normalise IS 'Expression over the value, $1, that is fingerprinted; empty for the value as it is';

CREATE TABLE rekey.progress_state (
    table_name     regclass PRIMARY KEY,
    file_node      oid NOT NULL,
    wave           text NOT NULL,
    cursor_block   bigint NOT NULL DEFAULT 0,
    blocks_left    bigint NOT NULL,
    blocks_total   bigint NOT NULL,
    rows_scanned   bigint NOT NULL DEFAULT 0,
    rows_rewritten bigint NOT NULL DEFAULT 0,
    rows_skipped   bigint NOT NULL DEFAULT 0,
    phase          text NOT NULL DEFAULT 'pass'
                   CHECK (phase IN ('pass', 'barrier', 'proof', 'done')),
    note           text NOT NULL DEFAULT '',
    started_at     timestamptz NOT NULL DEFAULT clock_timestamp(),
    updated_at     timestamptz NOT NULL DEFAULT clock_timestamp(),
    rows_unlisted  bigint NOT NULL DEFAULT 0,
    attempts       integer NOT NULL DEFAULT 0
);
COMMENT ON TABLE rekey.progress_state IS 'Where re-encryption of a table stands; not dumped';
COMMENT ON COLUMN rekey.progress_state.table_name IS 'Table, a leaf where it is partitioned';
COMMENT ON COLUMN rekey.progress_state.file_node IS 'File of the table for which the cursor counts';
COMMENT ON COLUMN rekey.progress_state.wave IS 'Slots and times of the rotations that the pass serves';
COMMENT ON COLUMN rekey.progress_state.cursor_block IS 'Block at which the next batch begins';
COMMENT ON COLUMN rekey.progress_state.blocks_left IS 'Blocks that this pass has still to visit';
COMMENT ON COLUMN rekey.progress_state.blocks_total IS 'Blocks of the table when the pass began';
COMMENT ON COLUMN rekey.progress_state.rows_scanned IS 'Rows looked at';
COMMENT ON COLUMN rekey.progress_state.rows_rewritten IS 'Rows re-encrypted';
COMMENT ON COLUMN rekey.progress_state.rows_skipped IS 'Rows that were locked or changed meanwhile, and are looked at again';
COMMENT ON COLUMN rekey.progress_state.phase IS 'pass, barrier, proof or done';
COMMENT ON COLUMN rekey.progress_state.note IS 'What it waits for';
COMMENT ON COLUMN rekey.progress_state.started_at IS 'When the pass began';
COMMENT ON COLUMN rekey.progress_state.updated_at IS 'When the last batch was committed';
COMMENT ON COLUMN rekey.progress_state.rows_unlisted IS 'Rows that failed and that rekey.quarantine has no room for';
COMMENT ON COLUMN rekey.progress_state.attempts IS 'Workers that have entered the table since the last batch: more than one when they die at it';

CREATE TABLE rekey.live_column (
    trigger_name text COLLATE "C" PRIMARY KEY,
    table_name   regclass NOT NULL,
    column_name  text COLLATE "C" NOT NULL,
    into_column  text COLLATE "C" NOT NULL,
    attnum       smallint NOT NULL,
    into_attnum  smallint NOT NULL,
    stamp        text NOT NULL,
    direction    text NOT NULL CHECK (direction IN ('encrypt', 'decrypt')),
    key_name     text COLLATE "C" NOT NULL DEFAULT '',
    source       text NOT NULL DEFAULT '',
    started_at   timestamptz NOT NULL DEFAULT clock_timestamp(),
    started_by   text NOT NULL DEFAULT current_user
);
COMMENT ON TABLE rekey.live_column IS 'Columns that are being encrypted, or decrypted, while they are in use';
COMMENT ON COLUMN rekey.live_column.trigger_name IS 'Trigger of the table that keeps the two columns alike; the row goes with it';
COMMENT ON COLUMN rekey.live_column.table_name IS 'Table';
COMMENT ON COLUMN rekey.live_column.column_name IS 'Column that is read; kept up to date for dumps';
COMMENT ON COLUMN rekey.live_column.into_column IS 'Column that is written; kept up to date for dumps';
COMMENT ON COLUMN rekey.live_column.attnum IS 'Number of the column that is read, which follows a rename';
COMMENT ON COLUMN rekey.live_column.into_attnum IS 'Number of the column that is written';
COMMENT ON COLUMN rekey.live_column.stamp IS 'Server, OID and making of the table for which the numbers count';
COMMENT ON COLUMN rekey.live_column.direction IS 'encrypt or decrypt';
COMMENT ON COLUMN rekey.live_column.key_name IS 'Key to seal under; empty for decrypt';
COMMENT ON COLUMN rekey.live_column.source IS 'Expression over the row that gives the value to seal; empty for the column itself. It may hold a key of pgcrypto: no view shows it';
COMMENT ON COLUMN rekey.live_column.started_at IS 'When it began';
COMMENT ON COLUMN rekey.live_column.started_by IS 'Who began it';

CREATE TABLE rekey.backfill_state (
    table_name     regclass PRIMARY KEY,
    file_node      oid NOT NULL,
    wave           text NOT NULL,
    cursor_block   bigint NOT NULL DEFAULT 0,
    blocks_left    bigint NOT NULL,
    blocks_total   bigint NOT NULL,
    rows_scanned   bigint NOT NULL DEFAULT 0,
    rows_rewritten bigint NOT NULL DEFAULT 0,
    rows_skipped   bigint NOT NULL DEFAULT 0,
    phase          text NOT NULL DEFAULT 'backfill' CHECK (phase IN ('backfill', 'done')),
    note           text NOT NULL DEFAULT '',
    started_at     timestamptz NOT NULL DEFAULT clock_timestamp(),
    updated_at     timestamptz NOT NULL DEFAULT clock_timestamp(),
    rows_unlisted  bigint NOT NULL DEFAULT 0,
    attempts       integer NOT NULL DEFAULT 0
);
COMMENT ON TABLE rekey.backfill_state IS 'How far the live columns of a table are filled; not dumped. The columns are those of rekey.progress_state';
COMMENT ON COLUMN rekey.backfill_state.table_name IS 'Table, a leaf where it is partitioned';
COMMENT ON COLUMN rekey.backfill_state.file_node IS 'File of the table for which the cursor counts';
COMMENT ON COLUMN rekey.backfill_state.wave IS 'Triggers of the live columns that the pass serves';
COMMENT ON COLUMN rekey.backfill_state.cursor_block IS 'Block at which the next batch begins';
COMMENT ON COLUMN rekey.backfill_state.blocks_left IS 'Blocks that this pass has still to visit';
COMMENT ON COLUMN rekey.backfill_state.blocks_total IS 'Blocks of the table when the pass began';
COMMENT ON COLUMN rekey.backfill_state.rows_scanned IS 'Rows looked at';
COMMENT ON COLUMN rekey.backfill_state.rows_rewritten IS 'Rows filled; not those that the trigger has filled';
COMMENT ON COLUMN rekey.backfill_state.rows_skipped IS 'Rows that this pass could not fill, and another one looks at';
COMMENT ON COLUMN rekey.backfill_state.phase IS 'backfill or done';
COMMENT ON COLUMN rekey.backfill_state.note IS 'What it waits for';
COMMENT ON COLUMN rekey.backfill_state.started_at IS 'When the first pass began';
COMMENT ON COLUMN rekey.backfill_state.updated_at IS 'When the last batch was committed';
COMMENT ON COLUMN rekey.backfill_state.rows_unlisted IS 'None: a row that fails stays unfilled, and is looked at again';
COMMENT ON COLUMN rekey.backfill_state.attempts IS 'Workers that have entered the table since the last batch: more than one when they die at it';

CREATE TABLE rekey.pause (
    table_name   regclass PRIMARY KEY,
    paused_until timestamptz NOT NULL DEFAULT 'infinity',
    reason       text NOT NULL DEFAULT '',
    paused_by    text NOT NULL,
    paused_at    timestamptz NOT NULL DEFAULT clock_timestamp()
);
COMMENT ON TABLE rekey.pause IS 'Tables whose re-encryption is paused; 0 is all of them; not dumped';
COMMENT ON COLUMN rekey.pause.table_name IS 'Table, or 0 for all';
COMMENT ON COLUMN rekey.pause.paused_until IS 'When it goes on by itself';
COMMENT ON COLUMN rekey.pause.reason IS 'Why';
COMMENT ON COLUMN rekey.pause.paused_by IS 'Role that paused it';
COMMENT ON COLUMN rekey.pause.paused_at IS 'When it was paused';

CREATE TABLE rekey.quarantine (
    quarantine_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    table_name    regclass NOT NULL,
    row_ref       tid NOT NULL,
    slot_id       bigint,
    sqlstate      text NOT NULL,
    tries         integer NOT NULL DEFAULT 1,
    first_try     timestamptz NOT NULL DEFAULT clock_timestamp(),
    next_try      timestamptz,
    dismissed_at  timestamptz,
    dismissed_by  text,
    reason        text NOT NULL DEFAULT '',
    heads         bytea NOT NULL,
    UNIQUE (table_name, heads)
);
COMMENT ON TABLE rekey.quarantine IS 'Rows that could not be re-encrypted, never their values; not dumped';
COMMENT ON SEQUENCE rekey.quarantine_quarantine_id_seq IS 'Numbers of the entries';
COMMENT ON COLUMN rekey.quarantine.quarantine_id IS 'Number of the entry';
COMMENT ON COLUMN rekey.quarantine.table_name IS 'Table';
COMMENT ON COLUMN rekey.quarantine.row_ref IS 'ctid of the row';
COMMENT ON COLUMN rekey.quarantine.slot_id IS 'Slot that its envelope names';
COMMENT ON COLUMN rekey.quarantine.sqlstate IS 'Error of the last try';
COMMENT ON COLUMN rekey.quarantine.tries IS 'Number of tries';
COMMENT ON COLUMN rekey.quarantine.first_try IS 'When it first failed';
COMMENT ON COLUMN rekey.quarantine.next_try IS 'When it is tried again';
COMMENT ON COLUMN rekey.quarantine.dismissed_at IS 'When somebody decided to do without the row''s value';
COMMENT ON COLUMN rekey.quarantine.dismissed_by IS 'Who decided';
COMMENT ON COLUMN rekey.quarantine.reason IS 'Why';
COMMENT ON COLUMN rekey.quarantine.heads IS 'Headers and nonces of the envelopes concerned: they tell them from every other, wherever the row moves';

CREATE SEQUENCE rekey.audit_id AS bigint;
COMMENT ON SEQUENCE rekey.audit_id IS 'Numbers of the audit rows';
CREATE TABLE rekey.audit_log (
    audit_id     bigint PRIMARY KEY DEFAULT pg_catalog.nextval('rekey.audit_id'::regclass),
    at           timestamptz NOT NULL DEFAULT clock_timestamp(),
    action       text NOT NULL,
    key_name     text COLLATE "C",
    slot_id      bigint,
    from_state   text,
    to_state     text,
    actor        text NOT NULL,
    session_role text NOT NULL DEFAULT session_user,
    detail       text NOT NULL DEFAULT '',
    xid          xid8 NOT NULL DEFAULT pg_catalog.pg_current_xact_id()
);
ALTER SEQUENCE rekey.audit_id OWNED BY rekey.audit_log.audit_id;
COMMENT ON TABLE rekey.audit_log IS 'One row per transition, written in the transaction that made it';
COMMENT ON COLUMN rekey.audit_log.audit_id IS 'Number of the row';
COMMENT ON COLUMN rekey.audit_log.at IS 'When';
COMMENT ON COLUMN rekey.audit_log.action IS 'Function that acted';
COMMENT ON COLUMN rekey.audit_log.key_name IS 'Key concerned';
COMMENT ON COLUMN rekey.audit_log.slot_id IS 'Slot concerned';
COMMENT ON COLUMN rekey.audit_log.from_state IS 'State before';
COMMENT ON COLUMN rekey.audit_log.to_state IS 'State after';
COMMENT ON COLUMN rekey.audit_log.actor IS 'Role whose privilege was used';
COMMENT ON COLUMN rekey.audit_log.session_role IS 'Role that logged in';
COMMENT ON COLUMN rekey.audit_log.detail IS 'Reason, or what was granted or changed';
COMMENT ON COLUMN rekey.audit_log.xid IS 'Transaction';

CREATE TABLE rekey.barrier (nothing boolean PRIMARY KEY CHECK (false));
COMMENT ON TABLE rekey.barrier IS 'Always empty: transactions that seal hold a lock on it, so that a rotation can wait for them';
COMMENT ON COLUMN rekey.barrier.nothing IS 'No row can exist';

-- Dumps: a dropped table or role would dump as a bare number and break the restore. pg_dump runs
-- these filters under an empty search path: no operator but PostgreSQL's own can get in.
SELECT pg_catalog.pg_extension_config_dump('rekey.key', '');
SELECT pg_catalog.pg_extension_config_dump('rekey.key_slot', '');
SELECT pg_catalog.pg_extension_config_dump('rekey.slot_wrap', '');
SELECT pg_catalog.pg_extension_config_dump('rekey.root_key', '');
SELECT pg_catalog.pg_extension_config_dump('rekey.key_grant',
    'WHERE grantee = 0 OR EXISTS (SELECT FROM pg_catalog.pg_roles r WHERE r.oid = grantee)');
SELECT pg_catalog.pg_extension_config_dump('rekey.registered_column',
    'WHERE EXISTS (SELECT FROM pg_catalog.pg_class c WHERE c.oid = table_name)');
SELECT pg_catalog.pg_extension_config_dump('rekey.live_column',
    'WHERE EXISTS (SELECT FROM pg_catalog.pg_class c WHERE c.oid = table_name)');
SELECT pg_catalog.pg_extension_config_dump('rekey.audit_log', '');
SELECT pg_catalog.pg_extension_config_dump('rekey.audit_id', '');
