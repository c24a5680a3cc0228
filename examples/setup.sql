-- The administrator's part, the same for every example: the extension, two keys, and what the
-- application may do with them. Run once as a superuser in the application's database, which
-- belongs to the role "app": migrations create and register tables as their owner.

CREATE EXTENSION pg_rekey;
SELECT rekey.init_root_key() AS root_id;
SELECT rekey.create_key('pii', comment => 'personal data') AS pii,
       rekey.create_key('email_lookup', purpose => 'lookup', comment => 'search by email') AS lookup;
SELECT rekey.grant_key('pii', 'app', '{encrypt,decrypt}'),
       rekey.grant_key('email_lookup', 'app', '{encrypt}');
