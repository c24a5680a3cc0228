-- How many customers open to the expected values, all five. Run by demo.sh as shop_app.
SELECT count(*) FILTER (WHERE check_customer(id, rev,
    decrypt_col(name_c,                      rekey.context('customer.name', id::text)),
    decrypt_col(email_c,                     rekey.context('customer.email', id::text)),
    decrypt_col(national_id_c,               rekey.context('customer.national_id', id::text)),
    decrypt_col_as(notes_c, NULL::jsonb,     rekey.context('customer.notes', id::text)),
    decrypt_col_as(salary_c, NULL::numeric,  rekey.context('customer.salary', id::text))))
FROM customers;
