-- A customer's email in upper case finds him, and opens. Run as round.sql is.
SELECT 1 / (count(*) = 1)::int FROM customer_by_email(upper(:email))
 WHERE name = :name AND email = :email;
