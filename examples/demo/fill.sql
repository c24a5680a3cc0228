-- 200,000 customers, five sealed values each, in one statement. Run by demo.sh as shop_app.
INSERT INTO customers
SELECT id, 0,
       encrypt_col(customer_name(id), 'pii', rekey.context('customer.name', id::text)),
       encrypt_col(customer_email(id, 0), 'pii', rekey.context('customer.email', id::text)),
       encrypt_col(customer_national_id(id), 'pii',
                   rekey.context('customer.national_id', id::text)),
       encrypt_col(customer_notes(id, 0), 'pii', rekey.context('customer.notes', id::text)),
       encrypt_col(customer_salary(id, 0), 'pii', rekey.context('customer.salary', id::text))
FROM generate_series(1, 200000) AS id;
