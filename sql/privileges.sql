-- Who may use what. Default privileges of the database may have opened what was created here, or
-- closed it: everything is taken from everyone first, and given again by name.

DO $$
DECLARE
    given record;
BEGIN
    FOR given IN
        SELECT CASE c.relkind WHEN 'S' THEN 'SEQUENCE' ELSE 'TABLE' END AS kind,
               format('rekey.%I', c.relname) AS object, a.grantee
          FROM pg_class c, aclexplode(c.relacl) a
         WHERE c.relnamespace = 'rekey'::regnamespace AND a.grantee <> c.relowner
        UNION
        SELECT 'ROUTINE', p.oid::regprocedure::text, a.grantee
          FROM pg_depend d
          JOIN pg_extension e ON e.oid = d.refobjid AND e.extname = 'pg_rekey'
          JOIN pg_proc p ON p.oid = d.objid,
               aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a
         WHERE d.classid = 'pg_proc'::regclass AND d.refclassid = 'pg_extension'::regclass
           AND d.deptype = 'e' AND a.grantee <> p.proowner
        UNION
        SELECT 'SCHEMA', 'rekey', a.grantee
          FROM pg_namespace n, aclexplode(n.nspacl) a
         WHERE n.nspname = 'rekey' AND a.grantee <> n.nspowner
    LOOP
        EXECUTE format('REVOKE ALL ON %s %s FROM %s', given.kind, given.object,
            CASE WHEN given.grantee = '0'::oid THEN 'PUBLIC'
                 ELSE quote_ident(pg_get_userbyid(given.grantee)) END);
    END LOOP;
    -- Every function checks a privilege in code or only reads a header, but for these.
    FOR given IN
        SELECT p.oid::regprocedure::text AS object
          FROM pg_depend d
          JOIN pg_extension e ON e.oid = d.refobjid AND e.extname = 'pg_rekey'
          JOIN pg_proc p ON p.oid = d.objid
         WHERE d.classid = 'pg_proc'::regclass AND d.refclassid = 'pg_extension'::regclass
           AND d.deptype = 'e'
           AND p.proname NOT IN ('create_key', 'create_keys', 'init_root_key', 'reload_root_keys',
                                 'rotate_root_key', 'retire_root_key', 'mark_compromised_root',
                                 'restore_slot', 'export_key', 'import_key',
                                 'refuse_direct_change', 'announce_change', 'guard_drop',
                                 'forget_dropped', 'follow_renames', 'stamp_registration', 'yield_to_local',
                                 'pause', 'resume', 'find_envelopes',
                                 'envelope_places', 'evidence', 'check', 'check_findings',
                                 'rotation_forecast', 'explain_rotation')
    LOOP
        EXECUTE format('GRANT EXECUTE ON ROUTINE %s TO PUBLIC', given.object);
    END LOOP;
END
$$;
GRANT USAGE ON SCHEMA rekey TO PUBLIC;
GRANT SELECT ON rekey.keys, rekey.slots, rekey.grants, rekey.root_keys, rekey.audit, rekey.columns,
    rekey.progress, rekey.errors, rekey.live_columns TO PUBLIC;
-- For monitoring systems, on any server: changes nothing, shows no value and no key.
GRANT EXECUTE ON FUNCTION rekey.check(), rekey.check_findings() TO pg_monitor;
GRANT SELECT ON rekey.metrics TO pg_monitor;
