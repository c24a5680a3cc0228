-- Triggers that keep the catalog whole: who may change it, who hears of a change, and
-- what stands in the way of dropping it.

CREATE FUNCTION rekey.refuse_direct_change() RETURNS trigger
    LANGUAGE c AS 'MODULE_PATHNAME', 'refuse_direct_change_wrapper';
COMMENT ON FUNCTION rekey.refuse_direct_change() IS
    'Trigger: keys, slots and the audit log change through the functions of rekey only';
CREATE FUNCTION rekey.announce_change() RETURNS trigger
    LANGUAGE c AS 'MODULE_PATHNAME', 'announce_change_wrapper';
COMMENT ON FUNCTION rekey.announce_change() IS
    'Trigger: tells every session, standbys included, to read the catalog again';
CREATE FUNCTION rekey.guard_drop() RETURNS event_trigger
    LANGUAGE c AS 'MODULE_PATHNAME', 'guard_drop_wrapper';
COMMENT ON FUNCTION rekey.guard_drop() IS
    'Event trigger: loads the library before a DROP, so that it can refuse to lose keys';

-- ORIGIN, not ALWAYS: a logical apply worker must pass. INSERT stays open for restores.
CREATE TRIGGER refuse_direct_change BEFORE UPDATE OR DELETE OR TRUNCATE ON rekey.key
    FOR EACH STATEMENT EXECUTE FUNCTION rekey.refuse_direct_change();
CREATE TRIGGER refuse_direct_change BEFORE UPDATE OR DELETE OR TRUNCATE ON rekey.key_slot
    FOR EACH STATEMENT EXECUTE FUNCTION rekey.refuse_direct_change();
CREATE TRIGGER refuse_direct_change BEFORE UPDATE OR DELETE OR TRUNCATE ON rekey.slot_wrap
    FOR EACH STATEMENT EXECUTE FUNCTION rekey.refuse_direct_change();
CREATE TRIGGER refuse_direct_change BEFORE UPDATE OR DELETE OR TRUNCATE ON rekey.root_key
    FOR EACH STATEMENT EXECUTE FUNCTION rekey.refuse_direct_change();
CREATE TRIGGER refuse_direct_change BEFORE UPDATE OR DELETE OR TRUNCATE ON rekey.audit_log
    FOR EACH STATEMENT EXECUTE FUNCTION rekey.refuse_direct_change();
CREATE TRIGGER refuse_direct_change BEFORE UPDATE OR DELETE OR TRUNCATE ON rekey.registered_column
    FOR EACH STATEMENT EXECUTE FUNCTION rekey.refuse_direct_change();
CREATE TRIGGER refuse_direct_change BEFORE UPDATE OR DELETE OR TRUNCATE ON rekey.live_column
    FOR EACH STATEMENT EXECUTE FUNCTION rekey.refuse_direct_change();
COMMENT ON TRIGGER refuse_direct_change ON rekey.live_column IS 'It goes with the trigger that serves it';
COMMENT ON TRIGGER refuse_direct_change ON rekey.registered_column IS 'A column that is forgotten is a column that no proof looks at';
COMMENT ON TRIGGER refuse_direct_change ON rekey.key IS 'Changes go through the functions of rekey';
COMMENT ON TRIGGER refuse_direct_change ON rekey.key_slot IS 'Changes go through the functions of rekey';
COMMENT ON TRIGGER refuse_direct_change ON rekey.slot_wrap IS 'Changes go through the functions of rekey';
COMMENT ON TRIGGER refuse_direct_change ON rekey.root_key IS 'Changes go through the functions of rekey';
COMMENT ON TRIGGER refuse_direct_change ON rekey.audit_log IS 'The audit log only grows';

-- ALWAYS: restores with replication role and logical apply must be heard too.
CREATE TRIGGER announce_change AFTER INSERT OR UPDATE OR DELETE ON rekey.key
    FOR EACH ROW EXECUTE FUNCTION rekey.announce_change();
CREATE TRIGGER announce_truncate AFTER TRUNCATE ON rekey.key
    FOR EACH STATEMENT EXECUTE FUNCTION rekey.announce_change();
CREATE TRIGGER announce_change AFTER INSERT OR UPDATE OR DELETE ON rekey.key_slot
    FOR EACH ROW EXECUTE FUNCTION rekey.announce_change();
CREATE TRIGGER announce_truncate AFTER TRUNCATE ON rekey.key_slot
    FOR EACH STATEMENT EXECUTE FUNCTION rekey.announce_change();
CREATE TRIGGER announce_change AFTER INSERT OR UPDATE OR DELETE ON rekey.slot_wrap
    FOR EACH ROW EXECUTE FUNCTION rekey.announce_change();
CREATE TRIGGER announce_truncate AFTER TRUNCATE ON rekey.slot_wrap
    FOR EACH STATEMENT EXECUTE FUNCTION rekey.announce_change();
CREATE TRIGGER announce_change AFTER INSERT OR UPDATE OR DELETE ON rekey.key_grant
    FOR EACH ROW EXECUTE FUNCTION rekey.announce_change();
CREATE TRIGGER announce_truncate AFTER TRUNCATE ON rekey.key_grant
    FOR EACH STATEMENT EXECUTE FUNCTION rekey.announce_change();
ALTER TABLE rekey.key ENABLE ALWAYS TRIGGER announce_change, ENABLE ALWAYS TRIGGER announce_truncate;
ALTER TABLE rekey.key_slot ENABLE ALWAYS TRIGGER announce_change, ENABLE ALWAYS TRIGGER announce_truncate;
ALTER TABLE rekey.slot_wrap ENABLE ALWAYS TRIGGER announce_change, ENABLE ALWAYS TRIGGER announce_truncate;
ALTER TABLE rekey.key_grant ENABLE ALWAYS TRIGGER announce_change, ENABLE ALWAYS TRIGGER announce_truncate;
COMMENT ON TRIGGER announce_change ON rekey.key IS 'Sessions re-read the catalog';
COMMENT ON TRIGGER announce_truncate ON rekey.key IS 'Sessions re-read the catalog';
COMMENT ON TRIGGER announce_change ON rekey.key_slot IS 'Sessions re-read the catalog';
COMMENT ON TRIGGER announce_truncate ON rekey.key_slot IS 'Sessions re-read the catalog';
COMMENT ON TRIGGER announce_change ON rekey.slot_wrap IS 'Sessions re-read the catalog';
COMMENT ON TRIGGER announce_truncate ON rekey.slot_wrap IS 'Sessions re-read the catalog';
COMMENT ON TRIGGER announce_change ON rekey.key_grant IS 'Sessions re-read the catalog';
COMMENT ON TRIGGER announce_truncate ON rekey.key_grant IS 'Sessions re-read the catalog';

CREATE EVENT TRIGGER pg_rekey_guard_drop ON ddl_command_start
    WHEN TAG IN ('DROP EXTENSION', 'DROP SCHEMA', 'DROP OWNED')
    EXECUTE FUNCTION rekey.guard_drop();
ALTER EVENT TRIGGER pg_rekey_guard_drop ENABLE ALWAYS;
COMMENT ON EVENT TRIGGER pg_rekey_guard_drop IS
    'pg_rekey does not go while a slot can still open something (rekey.allow_drop overrides)';

-- Restores and logical apply bring registrations of tables that have other numbers here.
CREATE FUNCTION rekey.stamp_registration() RETURNS trigger
    LANGUAGE c AS 'MODULE_PATHNAME', 'stamp_registration_wrapper';
COMMENT ON FUNCTION rekey.stamp_registration() IS
    'Trigger: a registration that is restored is stamped with the numbers of the restored table';
CREATE TRIGGER stamp_registration BEFORE INSERT ON rekey.registered_column
    FOR EACH ROW EXECUTE FUNCTION rekey.stamp_registration();
ALTER TABLE rekey.registered_column ENABLE ALWAYS TRIGGER stamp_registration;
COMMENT ON TRIGGER stamp_registration ON rekey.registered_column IS
    'A restored registration gets the numbers of the restored table';
CREATE TRIGGER stamp_registration BEFORE INSERT ON rekey.live_column
    FOR EACH ROW EXECUTE FUNCTION rekey.stamp_registration();
ALTER TABLE rekey.live_column ENABLE ALWAYS TRIGGER stamp_registration;
COMMENT ON TRIGGER stamp_registration ON rekey.live_column IS
    'A restored live column gets the numbers of the restored table';

-- A publication FOR ALL TABLES carries the catalog too. Its rows must never stop an apply worker at a
-- subscriber that has a root key, keys or an audit log of its own: what is here stays. The worker
-- is a session with replication role too, and applies nothing.
CREATE FUNCTION rekey.is_applying() RETURNS boolean
    LANGUAGE c STABLE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'is_applying_wrapper';
COMMENT ON FUNCTION rekey.is_applying() IS
    'Whether this session applies the changes of another server: it has set up a replication origin';
CREATE FUNCTION rekey.yield_to_local() RETURNS trigger
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    known boolean := false;
BEGIN
    IF TG_TABLE_NAME = 'audit_log' THEN
        -- Local rows as well: the sequence does not know which numbers an apply worker has brought.
        WHILE EXISTS (SELECT FROM rekey.audit_log a WHERE a.audit_id = NEW.audit_id) LOOP
            NEW.audit_id := nextval('rekey.audit_id'::regclass);
        END LOOP;
        RETURN NEW;
    ELSIF TG_TABLE_NAME IN ('progress_state', 'backfill_state', 'pause', 'quarantine') THEN
        -- How far the publisher's worker is says nothing here.
        RETURN NULL;
    ELSIF TG_TABLE_NAME = 'root_key' THEN
        known := EXISTS (SELECT FROM rekey.root_key r WHERE r.root_id = NEW.root_id);
        IF NEW.state = 'active' AND EXISTS (SELECT FROM rekey.root_key r
                 WHERE r.state = 'active' AND r.root_id <> NEW.root_id) THEN
            NEW.state := 'previous';
        END IF;
    ELSIF TG_TABLE_NAME = 'key' THEN
        known := EXISTS (SELECT FROM rekey.key k WHERE k.key_name = NEW.key_name);
    ELSIF TG_TABLE_NAME = 'key_slot' THEN
        -- The same id with another key is an error all the same.
        known := EXISTS (SELECT FROM rekey.key_slot s
                 WHERE s.slot_id = NEW.slot_id AND s.check_value = NEW.check_value);
        IF NEW.state IN ('active', 'pending') AND EXISTS (SELECT FROM rekey.key_slot s
                 WHERE s.key_name = NEW.key_name AND s.state = NEW.state
                   AND s.slot_id <> NEW.slot_id) THEN
            NEW.state := 'previous';
            NEW.superseded_at := coalesce(NEW.superseded_at, clock_timestamp());
        END IF;
        IF EXISTS (SELECT FROM rekey.key_slot s WHERE s.key_name = NEW.key_name
                      AND s.version = NEW.version AND s.slot_id <> NEW.slot_id) THEN
            NEW.version := (SELECT max(s.version) + 1 FROM rekey.key_slot s
                             WHERE s.key_name = NEW.key_name);
        END IF;
    ELSIF TG_TABLE_NAME = 'slot_wrap' THEN
        known := EXISTS (SELECT FROM rekey.slot_wrap w
                 WHERE (w.slot_id, w.root_id) = (NEW.slot_id, NEW.root_id));
    ELSIF TG_TABLE_NAME = 'key_grant' THEN
        known := EXISTS (SELECT FROM rekey.key_grant g WHERE (g.key_name, g.grantee, g.privilege)
                      = (NEW.key_name, NEW.grantee, NEW.privilege));
    ELSIF TG_TABLE_NAME = 'registered_column' THEN
        known := EXISTS (SELECT FROM rekey.registered_column c
                 WHERE c.table_name = NEW.table_name AND c.column_name = NEW.column_name);
    ELSIF TG_TABLE_NAME = 'live_column' THEN
        known := EXISTS (SELECT FROM rekey.live_column l WHERE l.trigger_name = NEW.trigger_name);
    END IF;
    RETURN CASE WHEN NOT known OR TG_OP = 'UPDATE' THEN NEW END;
END
$$;
COMMENT ON FUNCTION rekey.yield_to_local() IS
    'Trigger: rows of a publisher''s catalog yield to those that are here and never stop an apply worker';
CREATE TRIGGER yield_to_local BEFORE INSERT ON rekey.audit_log
    FOR EACH ROW EXECUTE FUNCTION rekey.yield_to_local();
ALTER TABLE rekey.audit_log ENABLE ALWAYS TRIGGER yield_to_local;
COMMENT ON TRIGGER yield_to_local ON rekey.audit_log IS 'A row whose number is taken gets another one';
DO $$
DECLARE
    fires record;
BEGIN
    FOR fires IN VALUES ('key', 'INSERT'), ('slot_wrap', 'INSERT'), ('key_grant', 'INSERT'),
                        ('registered_column', 'INSERT'), ('live_column', 'INSERT'),
                        ('backfill_state', 'INSERT OR UPDATE OR DELETE'), ('root_key', 'INSERT OR UPDATE'),
                        ('key_slot', 'INSERT OR UPDATE'), ('progress_state', 'INSERT OR UPDATE OR DELETE'),
                        ('pause', 'INSERT OR UPDATE OR DELETE'), ('quarantine', 'INSERT OR UPDATE OR DELETE')
    LOOP
        EXECUTE format('CREATE TRIGGER yield_to_local BEFORE %s ON rekey.%I
                            FOR EACH ROW WHEN (rekey.is_applying())
                            EXECUTE FUNCTION rekey.yield_to_local()',
                       fires.column2, fires.column1);
        EXECUTE format('ALTER TABLE rekey.%I ENABLE REPLICA TRIGGER yield_to_local', fires.column1);
        EXECUTE format('COMMENT ON TRIGGER yield_to_local ON rekey.%I IS %L', fires.column1,
                       'What an apply worker brings yields to what is here');
    END LOOP;
END
$$;

CREATE FUNCTION rekey.follow_renames() RETURNS event_trigger
    LANGUAGE c AS 'MODULE_PATHNAME', 'follow_renames_wrapper';
COMMENT ON FUNCTION rekey.follow_renames() IS
    'Event trigger: a registered column is followed by its number, and dumped by its present name';
CREATE EVENT TRIGGER pg_rekey_follow_renames ON ddl_command_end
    WHEN TAG IN ('ALTER TABLE')
    EXECUTE FUNCTION rekey.follow_renames();
ALTER EVENT TRIGGER pg_rekey_follow_renames ENABLE ALWAYS;
COMMENT ON EVENT TRIGGER pg_rekey_follow_renames IS
    'Registered columns are dumped by their present names';

CREATE FUNCTION rekey.forget_dropped() RETURNS event_trigger
    LANGUAGE c AS 'MODULE_PATHNAME', 'forget_dropped_wrapper';
COMMENT ON FUNCTION rekey.forget_dropped() IS
    'Event trigger: a dropped table takes its registration with it, so that no later table inherits it by its OID; a dropped trigger its live column';
CREATE EVENT TRIGGER pg_rekey_forget_dropped ON sql_drop
    WHEN TAG IN ('DROP TABLE', 'DROP SCHEMA', 'DROP OWNED', 'DROP EXTENSION', 'DROP TYPE', 'DROP TRIGGER', 'ALTER TABLE')
    EXECUTE FUNCTION rekey.forget_dropped();
ALTER EVENT TRIGGER pg_rekey_forget_dropped ENABLE ALWAYS;
COMMENT ON EVENT TRIGGER pg_rekey_forget_dropped IS
    'A dropped table takes its registration with it, a dropped trigger its live column';
