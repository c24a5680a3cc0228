-- What an application does, as pgbench runs it with bound parameters:
--   pgbench -n -M extended -t 1 -f round.sql -D name=ada -D first=ada@home -D email=ada@work
-- A customer that is found and should not be is a division by zero.
SELECT add_customer(:name, :first) AS id \gset
SELECT change_email(:id, :email);
SELECT 1 / (count(*) = 0)::int FROM customer_by_email(:first);
